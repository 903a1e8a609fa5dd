"""Answers how far a student is from its labels and from its teacher: one small pure function per named loss.

Does not weigh or add the terms, rectify targets or know any model. Every loss computes in float32, whatever
the inputs' dtype, and takes the mean over the batch. Gradients reach the student's tensors only.

Shapes: B batch, C classes, D feature dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ConfigError, ShapeError


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Classification: -1 / B * sum_b log softmax(z_b)[y_b].

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        labels: [B] int64 in [0, C).
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: the batch sizes differ.
    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    _check_labels(student_logits, labels)
    return F.cross_entropy(student_logits.to(torch.float32), labels)


def balanced_softmax(student_logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """Classification: cross entropy of z + log n, so that z itself learns a balanced posterior.

        -1 / B * sum_b log( n_y exp(z_y) / sum_c n_c exp(z_c) )

    Args:
        student_logits: [B, C], any float dtype; gradients flow. Use them unshifted for prediction.
        labels: [B] int64 in [0, C).
        class_counts: [C] training samples per class, >= 1.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
    Source: Ren et al. 2020 (arXiv:2007.10740). Deviation: none.
    Example:
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> balanced_softmax(z, y, torch.tensor([3, 1]))  # -log(1 / 4)
        tensor(1.3863)
    """
    _check_labels(student_logits, labels)
    if class_counts.shape != student_logits.shape[1:]:
        raise ShapeError(
            f"class_counts has shape {tuple(class_counts.shape)}, student_logits "
            f"{tuple(student_logits.shape)}; expected [C] and [B, C]."
        )
    return F.cross_entropy(student_logits.to(torch.float32) + class_counts.to(torch.float32).log(), labels)


def kd_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Distillation term: KL(teacher || student) of the softened class distributions, times T^2.

        T^2 / B * sum_b sum_c p_t[b, c] * (log p_t[b, c] - log p_s[b, c]),   p = softmax(z / T)

    T^2 keeps the gradient's scale independent of T. Zero if and only if both agree; KL, not cross-entropy.
    With rectified logits as the teacher's this is L_LRD ("lrd").

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        temperature: T > 0, the same for both.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: the two shapes differ.
        ConfigError: the temperature is not positive and finite.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2. Deviation: none.
    Example:
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> float(kd_kl(z, z + 5, temperature=4.0))
        0.0
    """
    _check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits, "[B, C]")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"loss.temperature must be > 0 and finite, got {temperature}")
    log_p_student = F.log_softmax(student_logits.to(torch.float32) / temperature, dim=1)
    log_p_teacher = F.log_softmax(teacher_logits.detach().to(torch.float32) / temperature, dim=1)
    kl = F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    return kl * temperature**2


def rrd_cosine(projected_features: Tensor, rectified_features: Tensor) -> Tensor:
    """Distillation term: 1 / B * sum_b [1 - cos(P f_s,b , r_b)], from 0 (aligned) to 2 (opposite).

    Args:
        projected_features: [B, D] student features after the projector P, any float dtype; gradients flow.
        rectified_features: [B, D], any length; treated as constant.
    Returns:
        Scalar float32, mean over the batch.
    Raises:
        ShapeError: the two shapes differ.
    Source: RRD in KRDistill (arXiv:2409.07694), this project's reading, docs/design.md section 4.
    Example:
        >>> rrd_cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.)
    """
    _check_same_shape(
        "projected_features", projected_features, "rectified_features", rectified_features, "[B, D]"
    )
    student = F.normalize(projected_features.to(torch.float32), dim=1)
    target = F.normalize(rectified_features.detach().to(torch.float32), dim=1)
    return (1.0 - (student * target).sum(dim=1)).mean()


def _check_labels(student_logits: Tensor, labels: Tensor) -> None:
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise ShapeError(
            f"student_logits has shape {tuple(student_logits.shape)}, labels {tuple(labels.shape)}; "
            "expected [B, C] and [B]."
        )


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor, expected: str) -> None:
    if tensor.ndim != 2 or tensor.shape != other.shape:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}; "
            f"expected {expected} for both."
        )


NEEDS = frozenset(
    {"class_counts", "teacher_logits", "teacher_features", "rectified_logits", "rectified_features"}
)


@dataclass(frozen=True)
class LossRecord:
    """One named loss: its function, what must exist besides student and labels, and where it comes from.

    `needs` holds names out of `NEEDS`. A term that needs "rectified_logits" takes them as `teacher_logits`.
    The keys of `DISTILLATION_TERMS` are the names of the config's sections below `loss`.
    """

    fn: Callable[..., Tensor]
    needs: frozenset[str]
    source: str


CLASSIFICATION_LOSSES: dict[str, LossRecord] = {
    "cross_entropy": LossRecord(cross_entropy, frozenset(), "maximum likelihood"),
    "balanced_softmax": LossRecord(balanced_softmax, frozenset({"class_counts"}), "arXiv:2007.10740"),
}

DISTILLATION_TERMS: dict[str, LossRecord] = {
    "kd": LossRecord(kd_kl, frozenset({"teacher_logits"}), "arXiv:1503.02531"),
    "lrd": LossRecord(kd_kl, frozenset({"rectified_logits"}), "arXiv:2409.07694"),
    "rrd": LossRecord(rrd_cosine, frozenset({"rectified_features"}), "arXiv:2409.07694"),
}
