"""Answers how far a student's class distribution is from its teacher's: one KL divergence per named target.

Does not hold losses over groups (`class_groups`), rankings (`listwise`) or rectified targets (`rectified_terms`),
and does not weigh or add terms. All compute in float32 and take the mean over the batch; gradients reach the
student's logits only. T^2 keeps a gradient's scale independent of the temperature (arXiv:1503.02531).

Shapes: B batch, C classes. Symbols: z_t, z_s logits of teacher and student, y label, T temperature.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.maths.classification import effective_number_weights
from krd_ray.maths.loss_inputs import (
    check_labels,
    check_logits,
    check_per_class,
    check_setting,
    constant,
    kl_rows,
    log_softened,
)
from krd_ray.maths.rectify import rectify_logits


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Distillation term: KL(teacher || student) of the softened class distributions, times T^2.

        T^2 / B * sum_b sum_c p_t[b, c] * (log p_t[b, c] - log p_s[b, c]),   p = softmax(z / T)

    Zero if and only if both agree; KL, not cross-entropy.

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
        >>> float(kd(z, z + 5, temperature=4.0))
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    log_target = log_softened(constant(teacher_logits), temperature)
    return temperature**2 * kl_rows(log_target, log_softened(student_logits, temperature)).mean()


def dive(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, power: float) -> Tensor:
    """Distillation term: KD from virtual examples, the teacher's distribution flattened by a power.

        T^2 * KL(t || softmax(z_s / T)),   t ~ softmax(z_t / T)^power, renormalised

    Equal to a teacher of temperature T / power. power < 1 moves mass from head to tail.

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        temperature: T > 0.
        power: > 0; 1 is KD.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: the two shapes differ.
        ConfigError: a setting is not positive and finite.
    Source: He et al. 2021 (arXiv:2103.15042), T = 3 and power 0.5. Deviation: the KL term alone; the authors mix
        it with their classification loss as alpha and 1 - alpha, which are two weights of the objective here.
    Example:
        >>> z_t, z_s = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> float(dive(z_s, z_t, temperature=1.0, power=0.5))  # half the logit, half the teacher's certainty
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    check_setting("power", power, 0 < power < math.inf, "> 0 and finite")
    log_target = torch.log_softmax(power * log_softened(constant(teacher_logits), temperature), dim=1)
    return temperature**2 * kl_rows(log_target, log_softened(student_logits, temperature)).mean()


def bkd(
    student_logits: Tensor, teacher_logits: Tensor, class_counts: Tensor, *, temperature: float, beta: float
) -> Tensor:
    """Distillation term: KD from the teacher's distribution with its classes weighed by effective number.

        T^2 * KL(q || softmax(z_s / T)),   q ~ w softmax(z_t / T), renormalised
        w_c = (1 - beta) / (1 - beta^n_c)

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        class_counts: [C] training samples per class, >= 1.
        temperature: T > 0.
        beta: in [0, 1); 0 is KD.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: logits or numbers of classes differ.
        ConfigError: a setting is out of range.
    Source: Zhang et al. 2021 (arXiv:2104.10510), section 3 and the authors' code. Deviation: the distillation term
        alone; the cross entropy that the authors add is the classification loss here.
    Example:
        >>> n = torch.tensor([2, 1])
        >>> float(bkd(torch.zeros(1, 2), torch.tensor([[0.8, 1.2]]).log().neg(), n, temperature=1.0, beta=0.5))
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    log_target = weighed_by_class(log_softened(constant(teacher_logits), temperature), class_counts, beta)
    return temperature**2 * kl_rows(log_target, log_softened(student_logits, temperature)).mean()


def knowledge_adjustment(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """Distillation term: KD from a teacher whose errors are put right.

        T^2 * KL(p || softmax(z_s / T)),   p = softmax(z_t / T), p[y] exchanged with max p where y is not the largest

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        labels: [B] int64 in [0, C).
        temperature: T > 0.
    Returns:
        Scalar float32, mean over the batch, nats.
    Raises:
        ShapeError: logits differ, or labels are not one per row.
        ConfigError: the temperature is not positive and finite.
    Source: Wen et al. 2019 (arXiv:1911.07471), knowledge adjustment by probability shift. Deviation: without the
        paper's dynamic temperature.
    Example:
        >>> z_t, z_s = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
        >>> float(knowledge_adjustment(z_s, z_t, torch.tensor([2]), temperature=4.0))
        0.0
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    check_labels(student_logits, labels)
    no_prior = teacher_logits.new_zeros(teacher_logits.shape[1])
    corrected = rectify_logits(teacher_logits.detach(), labels, no_prior, tau_prior=0.0, exchange=True)
    return kd(student_logits, corrected, temperature=temperature)


def cckd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Distillation term: each sample follows the teacher as far as the teacher believes its label, else the label.

        1 / B * sum_b [ g_b T^2 KL(softmax(z_t / T) || softmax(z_s / T)) - (1 - g_b) log softmax(z_s)[y] ],
        g_b = softmax(z_t)[y]

    The second part is a cross entropy with the labels: `classification.weight: 0` beside it gives the paper's
    objective; otherwise it adds to the classification loss where the teacher is unsure.

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        teacher_logits: [B, C], temperature not applied; treated as constant.
        labels: [B] int64 in [0, C).
        temperature: T > 0 of the distillation part; the teacher's belief g is taken at temperature 1.
    Returns:
        Scalar float32, mean over the batch, nats. Not zero where the student equals an unsure teacher.
    Raises:
        ShapeError: logits differ, or labels are not one per row.
        ConfigError: the temperature is not positive and finite.
    Source: Mishra and Sundaram 2021, confidence conditioned knowledge distillation (arXiv:2107.06993), the loss form
        CCKD-L. Deviation: written from the abstract and from summaries of the paper (its equations were not at
        hand), so temperatures and T^2 are this project's reading; without the self-regulation that skips samples
        and without the target form CCKD-T, which has the same gradient at T = 1.
    Example:
        >>> z_t, z_s = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> cckd(z_s, z_t, torch.tensor([1]), temperature=4.0)  # no KL; half of log 2
        tensor(0.3466)
    """
    check_logits(student_logits, "teacher_logits", teacher_logits)
    check_labels(student_logits, labels)
    log_target = log_softened(constant(teacher_logits), temperature)
    kl = temperature**2 * kl_rows(log_target, log_softened(student_logits, temperature))
    belief = label_probability(constant(teacher_logits), labels)
    nll = F.nll_loss(log_softened(student_logits, 1.0), labels, reduction="none")
    return (belief * kl + (1.0 - belief) * nll).mean()


def weighed_by_class(log_target: Tensor, class_counts: Tensor, beta: float) -> Tensor:
    """A distribution over classes multiplied by effective-number weights and renormalised.

    Args:
        log_target: [B, C] log-probabilities, nats.
        class_counts: [C] training samples per class, >= 1.
        beta: in [0, 1); 0 changes nothing.
    Returns:
        [B, C] float32 log-probabilities, nats.
    Raises:
        ShapeError: the numbers of classes differ.
        ConfigError: beta is out of range.
    Source: Zhang et al. 2021 (arXiv:2104.10510). Deviation: none.
    Example:
        >>> weighed_by_class(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([2, 1]), 0.5).exp()
        tensor([[0.4000, 0.6000]])
    """
    check_per_class("class_counts", class_counts, log_target)
    return torch.log_softmax(log_target + effective_number_weights(class_counts, beta).log(), dim=1)


def label_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(z_b)[y_b], untempered.

    Args:
        logits: [B, C].
        labels: [B] int64 in [0, C).
    Returns:
        [B] float32 in [0, 1].
    Example:
        >>> label_probability(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.2500])
    """
    return log_softened(logits, 1.0).gather(1, labels[:, None])[:, 0].exp()
