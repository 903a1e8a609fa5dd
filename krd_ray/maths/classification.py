"""Answers how far a student is from its labels: the classification losses, for balanced and long-tailed data.

Does not know the teacher (`distillation` does) and does not decide when classes are re-weighed (the caller does).

Every loss is the weighted mean over the batch, as torch's `cross_entropy(weight=...)`: the sum of w[y_b] * loss_b
over b, divided by the sum of w[y_b]. With equal weights it is the plain mean. All of them compute in float32.
With several workers each divides by the weights of its own batch, and their gradients are averaged.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.maths.loss_inputs import check_labels, check_per_class, check_setting, constant


def cross_entropy(student_logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Classification: weighted mean of -log softmax(z_b)[y_b].

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        labels: [B] int64 in [0, C).
        class_weights: [C] > 0; ones for the plain mean.
    Returns:
        Scalar float32, weighted mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
    Source: maximum likelihood. Deviation: none.
    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]), torch.ones(4))
        tensor(1.3863)
    """
    check_labels(student_logits, labels)
    check_per_class("class_weights", class_weights, student_logits)
    return F.cross_entropy(student_logits.to(torch.float32), labels, weight=constant(class_weights))


def balanced_softmax(
    student_logits: Tensor, labels: Tensor, class_counts: Tensor, class_weights: Tensor, *, tau: float
) -> Tensor:
    """Classification: cross entropy of z + tau log n, so that z itself learns a balanced posterior.

        -log( n_y^tau exp(z_y) / sum_c n_c^tau exp(z_c) )

    Args:
        student_logits: [B, C], any float dtype; gradients flow. Use them unshifted for prediction.
        labels: [B] int64 in [0, C).
        class_counts: [C] training samples per class, >= 1.
        class_weights: [C] > 0; ones for the plain mean.
        tau: strength of the label prior, >= 0; 1 is balanced softmax, 0 cross entropy.
    Returns:
        Scalar float32, weighted mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
        ConfigError: tau is negative or not finite.
    Source: Ren et al. 2020 (arXiv:2007.10740), tau = 1; Menon et al. 2020 (arXiv:2007.07314), the logit-adjusted
        loss for any tau. Deviation: none.
    Example:
        >>> z, y = torch.zeros(1, 2), torch.tensor([1])
        >>> balanced_softmax(z, y, torch.tensor([3, 1]), torch.ones(2), tau=1.0)  # -log(1 / 4)
        tensor(1.3863)
    """
    check_labels(student_logits, labels)
    check_per_class("class_counts", class_counts, student_logits)
    check_setting("tau", tau, 0 <= tau < math.inf, ">= 0 and finite")
    shifted = student_logits.to(torch.float32) + tau * constant(class_counts).log()
    return cross_entropy(shifted, labels, class_weights)


def class_balanced(
    student_logits: Tensor, labels: Tensor, class_counts: Tensor, class_weights: Tensor, *, beta: float
) -> Tensor:
    """Classification: cross entropy in which a class weighs by the inverse of its effective number of samples.

        weighted mean of -log softmax(z_b)[y_b], weights v_c * w_c,   v = effective_number_weights(n, beta)

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        labels: [B] int64 in [0, C).
        class_counts: [C] training samples per class, >= 1.
        class_weights: [C] > 0, multiplied onto v; ones leave v as it is.
        beta: in [0, 1); 0 weighs all classes the same, towards 1 by inverse count.
    Returns:
        Scalar float32, weighted mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
        ConfigError: beta is out of range.
    Source: Cui et al. 2019 (arXiv:1901.05555), the softmax form. Deviation: divided by the sum of the batch's
        weights, as torch does, where the authors divide by B; v's scale therefore cancels.
    Example:
        >>> z, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> class_balanced(z, y, torch.tensor([3, 1]), torch.ones(2), beta=0.9)  # weights 0.27 and 0.73
        tensor(1.5878)
    """
    check_labels(student_logits, labels)
    check_per_class("class_counts", class_counts, student_logits)
    check_per_class("class_weights", class_weights, student_logits)
    effective = effective_number_weights(class_counts, beta)
    return cross_entropy(student_logits, labels, class_weights * effective)


def focal(student_logits: Tensor, labels: Tensor, class_weights: Tensor, *, gamma: float) -> Tensor:
    """Classification: weighted mean of -(1 - p_y)^gamma log p_y, p = softmax(z): easy samples count less.

    Args:
        student_logits: [B, C], any float dtype; gradients flow.
        labels: [B] int64 in [0, C).
        class_weights: [C] > 0; ones for the plain mean.
        gamma: >= 0; 0 is cross entropy.
    Returns:
        Scalar float32, weighted mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
        ConfigError: gamma is negative or not finite.
    Source: Lin et al. 2017 (arXiv:1708.02002), equation 4. Deviation: softmax over classes instead of a sigmoid
        for each, as is usual for single-label images.
    Example:
        >>> focal(torch.zeros(1, 2), torch.tensor([0]), torch.ones(2), gamma=2.0)  # log(2) / 4
        tensor(0.1733)
    """
    check_labels(student_logits, labels)
    check_per_class("class_weights", class_weights, student_logits)
    check_setting("gamma", gamma, 0 <= gamma < math.inf, ">= 0 and finite")
    nll = F.cross_entropy(student_logits.to(torch.float32), labels, reduction="none")
    # 1 - p without cancellation; the floor keeps the power's slope finite where p rounds to 1.
    miss = (-torch.expm1(-nll)).clamp_min(torch.finfo(torch.float32).tiny)
    weights = constant(class_weights)[labels]
    return (weights * miss**gamma * nll).sum() / weights.sum()


def ldam(
    student_logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    class_weights: Tensor,
    *,
    max_margin: float,
    scale: float,
) -> Tensor:
    """Classification: cross entropy with a margin on the true class, wider for rarer classes.

        cross entropy of z - scale * m_y e_y,   m_c = max_margin * (min_j n_j / n_c)^(1/4)

    For a normalised classifier z = scale * cos this is LDAM to the letter. This project's classifiers are linear,
    and multiplying their logits by `scale` would only teach them logits `scale` times too small, far from the
    teacher's and no good for a calibrated prediction. So the logits stay as they are and the margin is brought to
    their unit: the defaults (0.5, 30) ask the rarest class for the 15 nats that they are in the paper. Only the
    product of the two settings matters.

    Args:
        student_logits: [B, C], any float dtype; gradients flow. Use them without the margin for prediction.
        labels: [B] int64 in [0, C).
        class_counts: [C] training samples per class, >= 1.
        class_weights: [C] > 0; ones for the plain mean.
        max_margin: margin of the rarest class as a cosine, >= 0; 0 is cross entropy.
        scale: logits per cosine, > 0.
    Returns:
        Scalar float32, weighted mean over the batch, nats.
    Raises:
        ShapeError: batch sizes or numbers of classes differ.
        ConfigError: a setting is out of range.
    Source: Cao et al. 2019 (arXiv:1906.07413), equation 13 and the n^(-1/4) of section 3.2. Deviation: weights and
        features are not normalised unless the student's own classifier does so; see above for the unit.
    Example:
        >>> z, y, n = torch.zeros(1, 2), torch.tensor([1]), torch.tensor([16, 1])
        >>> ldam(z, y, n, torch.ones(2), max_margin=0.5, scale=2.0)  # margin 1: log(1 + e)
        tensor(1.3133)
    """
    check_labels(student_logits, labels)
    check_per_class("class_counts", class_counts, student_logits)
    check_setting("max_margin", max_margin, 0 <= max_margin < math.inf, ">= 0 and finite")
    check_setting("scale", scale, 0 < scale < math.inf, "> 0 and finite")
    counts = constant(class_counts)
    margins = scale * max_margin * (counts.min() / counts) ** 0.25
    is_label = F.one_hot(labels, student_logits.shape[1])
    return cross_entropy(student_logits.to(torch.float32) - is_label * margins, labels, class_weights)


def effective_number_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Weight of each class: the inverse of its effective number of samples, scaled to sum to C.

        v_c ~ (1 - beta) / (1 - beta^n_c)

    Args:
        class_counts: [C] training samples per class, >= 1.
        beta: in [0, 1); 0 gives ones, towards 1 inverse counts.
    Returns:
        [C] float32, > 0, sums to C.
    Raises:
        ConfigError: beta is out of range.
    Source: Cui et al. 2019 (arXiv:1901.05555), equations 4 and 5. Deviation: none.
    Example:
        >>> effective_number_weights(torch.tensor([2, 1]), 0.5)  # 1 / 1.5 to 1
        tensor([0.8000, 1.2000])
    """
    check_setting("beta", beta, 0 <= beta < 1, "in [0, 1)")
    log_beta = math.log(beta) if beta > 0 else -math.inf
    inverse = -1.0 / torch.expm1(class_counts.detach().to(torch.float64) * log_beta)
    return (inverse * (len(inverse) / inverse.sum())).to(torch.float32)
