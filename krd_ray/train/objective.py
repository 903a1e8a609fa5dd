"""Answers which loss a student minimises: a classification loss plus the distillation terms that are switched on.

Does not hold formulas (`maths.losses` does) and does not ask the teacher (`teacher.client` does).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from krd_ray.config import LossConfig
from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS
from krd_ray.maths.rectify import Rectifier


@dataclass(frozen=True)
class StepTargets:
    """Soft targets of a step on the student's device: rectified logits [B, C] and features [B, D_t]."""

    logits: Tensor | None
    features: Tensor | None


def rectifier_for(loss: LossConfig) -> Rectifier | None:
    """Returns the form of targets that the objective needs, or None when it needs no teacher."""
    if not loss.needs_teacher:
        return None
    lrd, rrd = loss.lrd, loss.rrd
    return Rectifier(
        tau_prior=lrd.tau_prior if lrd.weight > 0 else 0.0,
        exchange=lrd.exchange and lrd.weight > 0,
        features=rrd.target if rrd.weight > 0 else "off",
        gate=rrd.gate,
        gate_strength=rrd.gate_strength,
        send_logits=max(lrd.weight, loss.kd.weight) > 0,
    )


def objective_terms(
    loss: LossConfig,
    *,
    student_logits: Tensor,
    projected: Tensor | None,
    labels: Tensor,
    class_counts: Tensor,
    targets: StepTargets | None,
) -> dict[str, Tensor]:
    """Returns the terms of the objective, unweighted, and their weighted sum.

        loss = w_cls * classification + kd.weight * L_KD + rrd.weight * L_RRD + lrd.weight * L_LRD

    Args:
        loss: weights, temperatures, names.
        student_logits: [B, C], any float dtype.
        projected: [B, D_t], the student's features after the projector; needed by rrd.
        labels: int64 [B].
        class_counts: int64 [C], of the training split.
        targets: rectified soft targets; needed by every term but classification.
    Returns:
        Scalars float32 (batch means): `loss`, `classification` and one entry per distillation term in use.
    """
    record = CLASSIFICATION_LOSSES[loss.classification.name]
    extra = {"class_counts": class_counts} if "class_counts" in record.needs else {}
    terms = {"classification": record.fn(student_logits, labels, **extra)}
    weights = {"classification": loss.classification.weight}
    if targets is not None:
        terms |= _distillation_terms(loss, student_logits, projected, targets)
        weights |= {name: getattr(loss, name).weight for name in DISTILLATION_TERMS}
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return {"loss": total, **terms}


def _distillation_terms(
    loss: LossConfig, student_logits: Tensor, projected: Tensor | None, targets: StepTargets
) -> dict[str, Tensor]:
    """The registry's terms that are switched on: on features where a record needs those, else on logits."""
    terms: dict[str, Tensor] = {}
    for name, record in DISTILLATION_TERMS.items():
        part = getattr(loss, name)
        if part.weight == 0:
            continue
        if "rectified_features" in record.needs:
            assert projected is not None
            terms[name] = record.fn(projected, targets.features)
        else:
            terms[name] = record.fn(student_logits, targets.logits, temperature=part.temperature)
    return terms
