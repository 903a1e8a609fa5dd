"""Answers how likely a student makes its teacher's ranking of the classes, the true class first.

Does not compare probabilities (`distillation` does).

Shapes: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from krd_ray.maths.loss_inputs import check_labels, check_logits, constant, log_softened


def pld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Distillation term: Plackett-Luce likelihood of a ranking, each choice weighed by the teacher's confidence.

        1 / B * sum_b sum_k p_t[r_k] * ( log sum_{j >= k} exp(z_s[r_j]) - z_s[r_k] ),   p_t = softmax(z_t / T)

    r is the ranking of sample b: its label first, then the other classes as the teacher ranks them. The first choice
    is cross entropy with weight p_t[y]; convex in z_s and unchanged by a constant on it. A teacher that is sure of an
    error therefore hardly teaches the label: pair this term with a classification loss.

    Args:
        student_logits: [B, C], any float dtype; gradients flow. Not divided by T.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        labels: [B] int64 in [0, C).
        temperature: T > 0 of the confidences; it does not change the ranking.
    Returns:
        Scalar float32, mean over the batch, nats; > 0, its least value is not 0.
    Raises:
        ShapeError: logits differ, or labels are not one per row.
        ConfigError: the temperature is not positive and finite.
    Source: Bassam et al. 2025 (arXiv:2506.12542), teacher-optimal ranking. Deviation: classes the teacher ranks the
        same keep their order; no T^2, as the student's logits are not tempered.
    Example:
        >>> z_t, z_s = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> pld(z_s, z_t, torch.tensor([1]), temperature=1.0)  # half of log 2; the last choice is certain
        tensor(0.3466)
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    check_labels(student_logits, labels)
    teacher = constant(teacher_logits)
    ranking = teacher.scatter(1, labels[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)
    confidence = log_softened(teacher, temperature).gather(1, ranking).exp()
    ranked = student_logits.to(torch.float32).gather(1, ranking)
    log_remaining = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    return (confidence * (log_remaining - ranked)).sum(dim=1).mean()
