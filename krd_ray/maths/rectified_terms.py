"""Answers how far a student is from rectified targets: logits without the prior's bias, features with balanced means.

Does not rectify anything (`rectify` does). All compute in float32 and take the mean over the batch; gradients reach
the student's tensors only.

Shapes: B batch, C classes, D teacher feature dimensions. Symbols as in docs/design.md, section 4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.maths.distillation import label_probability, weighed_by_class
from krd_ray.maths.loss_inputs import (
    check_labels,
    check_logits,
    check_per_class,
    check_same_shape,
    check_setting,
    constant,
    kl_rows,
    log_softened,
)
from krd_ray.maths.rectify import log_class_prior

SMALLEST_NORM = 1e-12


def lrd(
    student_logits: Tensor,
    rectified_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    temperature: float,
    tau_prior: float,
    space: Literal["balanced", "long_tailed"],
    weighting: Literal["none", "effective_number"],
    beta: float,
    gate: Literal["none", "confidence"],
) -> Tensor:
    """Distillation term: KL from the teacher's rectified logits z' to the student's, L_LRD.

        1 / B * sum_b g_b T^2 KL(q || softmax((z_s + shift) / T)),   q ~ w softmax((z' + shift) / T), renormalised

        space      balanced: shift = 0;   long_tailed: shift = tau_prior log pi, for target and student alike
        weighting  none: w = 1;   effective_number: w_c = (1 - beta) / (1 - beta^n_c), as in BKD
        gate       none: g = 1;   confidence: g = softmax(z')[y], untempered and without shift or w

    Both spaces ask for z_s = z' up to a constant; they differ in whose errors weigh most until it is reached.

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        rectified_logits: [B, C] z', temperature not applied; treated as constant.
        labels: [B] int64 in [0, C); matter to the gate only.
        class_counts: [C] training samples per class, >= 1.
        temperature: T > 0.
        tau_prior: strength >= 0 of the label prior, the one that was taken off z'.
        space: where the two are compared.
        weighting: of the target's classes.
        beta: in [0, 1), of effective_number.
        gate: weight of each sample; not renormalised, so unsure targets make the term smaller.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: logits, labels or counts differ in B or C.
        ConfigError: a setting is out of range.
    Source: LRD in KRDistill (arXiv:2409.07694), this project's reading, docs/design.md section 4; weighting from
        arXiv:2104.10510, shift from arXiv:2007.07314. Deviation: space, weighting and gate are ours.
    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> form = dict(tau_prior=1.0, space="long_tailed", weighting="none", beta=0.0, gate="confidence")
        >>> float(lrd(z, z + 1, torch.tensor([0]), torch.tensor([9, 1]), temperature=2.0, **form))
        0.0
    """
    check_logits(student_logits, "rectified_logits", rectified_logits)
    check_labels(student_logits, labels)
    check_per_class("class_counts", class_counts, student_logits)
    _check_lrd_settings(tau_prior, space, weighting, gate)
    shift = tau_prior * log_class_prior(class_counts) if space == "long_tailed" else 0.0
    log_target = log_softened(constant(rectified_logits) + shift, temperature)
    if weighting == "effective_number":
        log_target = weighed_by_class(log_target, class_counts, beta)
    log_student = log_softened(student_logits.to(torch.float32) + shift, temperature)
    kl = temperature**2 * kl_rows(log_target, log_student)
    if gate == "confidence":
        kl = kl * label_probability(constant(rectified_logits), labels)
    return kl.mean()


def rrd(
    projected_features: Tensor, rectified_features: Tensor, *, form: Literal["cosine", "norm_aware"]
) -> Tensor:
    """Distillation term: how far the student's features point away from the rectified ones, L_RRD.

        cosine      1 / B * sum_b [1 - cos(P f_s,b , r_b)]
        norm_aware  1 / B * sum_b [1 - P f_s,b . r_b / (|r_b| max(|P f_s,b|, |r_b|))]

    norm_aware asks the student's feature to be at least as long as r as well; the longer of both, only the
    direction counts.

    Args:
        projected_features: [B, D] student features after the projector P, any float dtype; gradients flow.
        rectified_features: [B, D], any length; treated as constant. Its length matters to norm_aware.
        form: how the two are compared.
    Returns:
        Scalar float32, mean over the batch, from 0 (aligned) to 2 (opposite).
    Raises:
        ShapeError: the two shapes differ.
        ConfigError: the form is unknown.
    Source: RRD in KRDistill (arXiv:2409.07694), this project's reading, docs/design.md section 4; norm_aware takes
        the form of arXiv:2305.17007. Deviation: ours throughout.
    Example:
        >>> f, r = torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> rrd(f, r, form="cosine"), rrd(f, r, form="norm_aware")  # 1 - 3 * 4 / (4 * 4)
        (tensor(0.), tensor(0.2500))
    """
    _check_features(projected_features, rectified_features)
    check_setting("form", form, form in ("cosine", "norm_aware"), "cosine or norm_aware")
    if form == "norm_aware":
        return _norm_and_direction(projected_features, rectified_features)
    student = F.normalize(projected_features.to(torch.float32), dim=1)
    target = F.normalize(constant(rectified_features), dim=1)
    return (1.0 - (student * target).sum(dim=1)).mean()


def nd(projected_features: Tensor, rectified_features: Tensor) -> Tensor:
    """Distillation term: features as long as the teacher's, in the direction of their class's mean.

        1 / B * sum_b [1 - P f_s,b . e_y / max(|P f_s,b|, |f_t,b|)],   e_y: unit vector to the teacher's class mean

    Args:
        projected_features: [B, D] student features after the projector P, any float dtype; gradients flow.
        rectified_features: [B, D] of direction e_y and length |f_t| (the teacher's uncentred feature); treated as
            constant.
    Returns:
        Scalar float32, mean over the batch, from 0 (aligned and long enough) to 2 (opposite).
    Raises:
        ShapeError: the two shapes differ.
    Source: Wang et al. 2023 (arXiv:2305.17007), ND loss. Deviation: every student has a projector, also where its
        features have the teacher's width.
    Example:
        >>> nd(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(0.5000)
    """
    _check_features(projected_features, rectified_features)
    return _norm_and_direction(projected_features, rectified_features)


def _norm_and_direction(projected_features: Tensor, rectified_features: Tensor) -> Tensor:
    student, target = projected_features.to(torch.float32), constant(rectified_features)
    length = target.norm(dim=1)
    longer = torch.maximum(student.norm(dim=1), length).clamp_min(SMALLEST_NORM)
    along = (student * F.normalize(target, dim=1)).sum(dim=1)
    return (1.0 - along / longer).mean()


def _check_features(projected_features: Tensor, rectified_features: Tensor) -> None:
    check_same_shape(
        "projected_features", projected_features, "rectified_features", rectified_features, "[B, D]"
    )


def _check_lrd_settings(tau_prior: float, space: str, weighting: str, gate: str) -> None:
    check_setting("tau_prior", tau_prior, 0 <= tau_prior < math.inf, ">= 0 and finite")
    check_setting("space", space, space in ("balanced", "long_tailed"), "balanced or long_tailed")
    check_setting(
        "weighting", weighting, weighting in ("none", "effective_number"), "none or effective_number"
    )
    check_setting("gate", gate, gate in ("none", "confidence"), "none or confidence")
