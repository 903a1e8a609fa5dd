"""Answers how far a student is from its teacher when classes are split into groups: between groups, and within each.

Does not weigh the term against others. Both losses rest on one identity: with q the mass of a group and p~ the
distribution within it, KL(p || s) = KL(q_p || q_s) + sum_G q_p[G] KL(p~_G || s~_G). They compute in float32 and take
the mean over the batch; gradients reach the student's logits only.

Shapes: B batch, C classes. Symbols: z_t, z_s logits of teacher and student, y label, T temperature.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ConfigError
from krd_ray.maths.loss_inputs import (
    check_labels,
    check_logits,
    check_per_class,
    check_setting,
    constant,
    kl_rows,
    log_softened,
)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """Distillation term: KD split into "is it the label?" and "which of the others?", each with its own weight.

        T^2 * [ alpha * KL(b_t || b_s) + beta * KL(o_t || o_s) ]

    b is softmax(z / T) as (label, all others), o is softmax(z / T) over the other classes alone. KD is the case
    alpha = 1 and beta = 1 - p_t[y], which differs from sample to sample.

    Args:
        student_logits: [B, C], C >= 2, any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        labels: [B] int64 in [0, C).
        temperature: T > 0.
        alpha: weight >= 0 of the label's part.
        beta: weight >= 0 of the others' part.
    Returns:
        Scalar float32, mean over the batch, nats; zero where both agree.
    Raises:
        ShapeError: logits differ, or labels are not one per row.
        ConfigError: a setting is out of range, or there is only one class.
    Source: Zhao et al. 2022 (arXiv:2203.08679), equation 7, with the T^2 of the authors' code. Deviation: none.
    Example:
        >>> z_t, z_s, y = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([0])
        >>> float(dkd(z_s, z_t, y, temperature=1.0, alpha=0.0, beta=8.0))  # the others agree
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    check_labels(student_logits, labels)
    _check_weights(alpha, beta)
    _check_num_classes("dkd", student_logits, 2)
    label_index = labels[:, None]
    skip_label = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    other_index = skip_label + (skip_label >= label_index)
    parts = []
    for logits in (constant(teacher_logits), student_logits):
        log_p = log_softened(logits, temperature)
        others = log_p.gather(1, other_index)
        mass = torch.cat([log_p.gather(1, label_index), others.logsumexp(dim=1, keepdim=True)], dim=1)
        parts.append((mass, others))
    (between_t, others_t), (between_s, others_s) = parts
    between = kl_rows(F.log_softmax(between_t, dim=1), F.log_softmax(between_s, dim=1))
    within = kl_rows(F.log_softmax(others_t, dim=1), F.log_softmax(others_s, dim=1))
    return temperature**2 * (alpha * between + beta * within).mean()


def ltkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_counts: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """Distillation term: KD split over head, medium and tail classes, each as important as the others.

        T^2 * [ alpha * KL(q^ || q_s) + beta * sum_G KL(p~_G || s~_G) ]

    q [B, 3] is the groups' mass under softmax(z / T). q^ is the teacher's, each group scaled so that all three have
    the same sum over the batch, then each sample normalised to 1. p~_G and s~_G are the distributions within group G;
    each group weighs 1 where KD weighs it by the teacher's mass.

    Args:
        student_logits: [B, C], C >= 3, any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        class_counts: [C] training samples per class, >= 1.
        temperature: T > 0.
        alpha: weight >= 0 of the part between groups.
        beta: weight >= 0 of the part within groups.
    Returns:
        Scalar float32, mean over the batch, nats. Depends on the batch as a whole, through q^: not a mean of what
        each sample gives alone, and each rank of a student scales by its own batch.
    Raises:
        ShapeError: logits or numbers of classes differ.
        ConfigError: a setting is out of range, or there are fewer than three classes.
    Source: Kim 2025 (arXiv:2506.18496), rebalanced cross-group and reweighted within-group loss. Deviation: the
        constant of the within-group parts is read as 1 (a sum, not a mean, over groups); classes with equal counts
        are told apart by their index.
    Example:
        >>> z, n = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([50, 5, 1])
        >>> float(ltkd(torch.zeros(1, 3), z, n, temperature=1.0, alpha=1.0, beta=1.0))  # one sample: q^ is uniform
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    _check_weights(alpha, beta)
    check_per_class("class_counts", class_counts, student_logits)
    groups = frequency_groups(class_counts)
    mass_t, within_t = _split(log_softened(constant(teacher_logits), temperature), groups)
    mass_s, within_s = _split(log_softened(student_logits, temperature), groups)
    rebalanced = F.log_softmax(mass_t - mass_t.logsumexp(dim=0), dim=1)
    within = torch.stack([kl_rows(t, s) for t, s in zip(within_t, within_s, strict=True)]).sum(dim=0)
    return temperature**2 * (alpha * kl_rows(rebalanced, mass_s) + beta * within).mean()


def frequency_groups(class_counts: Tensor) -> list[Tensor]:
    """Class indices of head, medium and tail: the most frequent 33 %, the next 34 %, the last 33 % of the classes.

    Args:
        class_counts: [C] training samples per class, C >= 3.
    Returns:
        Three int64 tensors that share out 0 .. C - 1; head and tail have round(0.33 C) classes each. Equal counts:
        lower index first.
    Raises:
        ConfigError: there are fewer than three classes.
    Source: Kim 2025 (arXiv:2506.18496). Deviation: rounding, which the source leaves open.
    Example:
        >>> [group.tolist() for group in frequency_groups(torch.tensor([5, 90, 40, 7]))]
        [[1], [2, 3], [0]]
    """
    num_classes = len(class_counts)
    _check_num_classes("ltkd", class_counts[None], 3)
    side = round(0.33 * num_classes)
    order = class_counts.argsort(descending=True, stable=True)
    return list(order.split([side, num_classes - 2 * side, side]))


def _split(log_p: Tensor, groups: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Log of each group's mass [B, G], and for each group the log-probabilities within it."""
    members = [log_p[:, group] for group in groups]
    mass = torch.stack([part.logsumexp(dim=1) for part in members], dim=1)
    return mass, [F.log_softmax(part, dim=1) for part in members]


def _check_weights(alpha: float, beta: float) -> None:
    check_setting("alpha", alpha, 0 <= alpha < math.inf, ">= 0 and finite")
    check_setting("beta", beta, 0 <= beta < math.inf, ">= 0 and finite")


def _check_num_classes(name: str, per_class: Tensor, needed: int) -> None:
    if per_class.shape[1] < needed:
        raise ConfigError(
            f"loss.{name} needs at least {needed} classes, the dataset has {per_class.shape[1]}; use kd instead."
        )
