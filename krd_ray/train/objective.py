"""Answers which loss a student minimises: a classification loss plus the distillation terms that are switched on.

Does not hold formulas (`maths.losses` does) and does not ask the teacher (`teacher.client` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krd_ray.config_loss import ClassificationConfig, LossConfig
from krd_ray.maths.classification import effective_number_weights
from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS, LossRecord
from krd_ray.maths.rectify import Rectifier


@dataclass(frozen=True)
class StepTargets:
    """Soft targets of a step on the student's device: logits [B, C] and features [B, D_t], in the form asked for."""

    logits: Tensor | None
    features: Tensor | None


def rectifier_for(loss: LossConfig) -> Rectifier | None:
    """Returns the form of targets that the objective needs, or None when it needs no teacher."""
    if not loss.needs_teacher:
        return None
    active, lrd, rrd = loss.active_terms, loss.lrd, loss.rrd
    logits = any(name not in ("rrd", "nd") for name in active)
    rectified: dict[str, Any] = {}
    if "lrd" in active:
        rectified = {"tau_prior": lrd.tau_prior, "exchange": lrd.exchange}
    if "nd" in active:
        rectified |= {"features": "class_direction", "length": "teacher"}
    if "rrd" in active:
        rectified |= {
            "features": rrd.target,
            "prior": rrd.prior,
            "gate": rrd.gate,
            "gate_strength": rrd.gate_strength,
            "length": "teacher" if rrd.form == "norm_aware" else "unit",
        }
    return Rectifier(send_logits=logits, **rectified)


def class_weights_at(config: ClassificationConfig, class_counts: Tensor, epoch: int) -> Tensor:
    """Returns the weight of each class in an epoch, float32 [C]: ones until deferred re-weighting begins."""
    if config.reweight_from_epoch is None or epoch < config.reweight_from_epoch:
        return torch.ones(len(class_counts), device=class_counts.device)
    return effective_number_weights(class_counts, config.beta)


def objective_terms(
    loss: LossConfig,
    *,
    student_logits: Tensor,
    projected: Tensor | None,
    labels: Tensor,
    class_counts: Tensor,
    class_weights: Tensor,
    targets: StepTargets | None,
) -> dict[str, Tensor]:
    """Returns the terms of the objective, unweighted, and their weighted sum.

        loss = w_cls * classification + sum over active terms of weight * term

    Args:
        loss: weights, settings, names.
        student_logits: [B, C], any float dtype.
        projected: [B, D_t], the student's features after the projector; needed by rrd and nd.
        labels: int64 [B].
        class_counts: int64 [C], of the training split.
        class_weights: float32 [C], from `class_weights_at`.
        targets: soft targets in the form of `rectifier_for`; needed by every term but classification.
    Returns:
        Scalars float32 (batch means): `loss`, `classification` and one entry per distillation term in use.
    """
    tensors: dict[str, Tensor | None] = {
        "student_logits": student_logits,
        "projected_features": projected,
        "labels": labels,
        "class_counts": class_counts,
        "class_weights": class_weights,
    }
    if targets is not None:
        tensors |= {"teacher_logits": targets.logits, "rectified_logits": targets.logits}
        tensors["rectified_features"] = targets.features
    first = loss.classification
    terms = {"classification": _call(CLASSIFICATION_LOSSES[first.name], tensors, first)}
    weights = {"classification": first.weight}
    for name in loss.active_terms:
        terms[name] = _call(DISTILLATION_TERMS[name], tensors, getattr(loss, name))
        weights[name] = getattr(loss, name).weight
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return {"loss": total, **terms}


def _call(record: LossRecord, tensors: dict[str, Tensor | None], section: Any) -> Tensor:
    """One record's function with the tensors it needs and the settings of its section."""
    settings = {name: getattr(section, name) for name in record.params}
    return record.fn(**{name: tensors[name] for name in record.needs}, **settings)
