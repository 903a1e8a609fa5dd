"""Answers whether what a loss was given fits together, and holds the one divergence that many losses share.

Does not know any named loss.

Shapes: B batch, C classes, D feature dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ConfigError, ShapeError


def constant(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32 and cut from the graph, for whatever is not the student's."""
    return tensor.detach().to(torch.float32)


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T).

    Args:
        logits: [B, C], any float dtype; gradients flow.
        temperature: T > 0.
    Returns:
        [B, C] float32, nats.
    Raises:
        ConfigError: the temperature is not positive and finite.
    Example:
        >>> log_softened(torch.tensor([[2.0, 2.0]]), 4.0).exp()
        tensor([[0.5000, 0.5000]])
    """
    check_setting("temperature", temperature, 0 < temperature < math.inf, "> 0 and finite")
    return F.log_softmax(logits.to(torch.float32) / temperature, dim=1)


def kl_rows(log_target: Tensor, log_student: Tensor) -> Tensor:
    """KL(target || student) of each row: sum_c t[c] (log t[c] - log s[c]).

    Args:
        log_target: [B, C] log-probabilities.
        log_student: [B, C] log-probabilities.
    Returns:
        [B], nats; zero if and only if the two rows agree.
    Example:
        >>> kl_rows(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
        tensor([0.1438])
    """
    return F.kl_div(log_student, log_target, reduction="none", log_target=True).sum(dim=1)


def check_labels(student_logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not one per row of the logits.

    Raises:
        ShapeError: names both shapes.
    """
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise ShapeError(
            f"student_logits has shape {tuple(student_logits.shape)}, labels {tuple(labels.shape)}; "
            "expected [B, C] and [B]."
        )


def check_per_class(name: str, values: Tensor, student_logits: Tensor) -> None:
    """Refuse what should hold one number per class and does not.

    Raises:
        ShapeError: names both shapes.
    """
    if values.shape != student_logits.shape[1:]:
        raise ShapeError(
            f"{name} has shape {tuple(values.shape)}, student_logits {tuple(student_logits.shape)}; "
            "expected [C] and [B, C]. Do both come from the same dataset?"
        )


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor, expected: str) -> None:
    """Refuse two tensors that are not matrices of one shape.

    Raises:
        ShapeError: names both shapes.
    """
    if tensor.ndim != 2 or tensor.shape != other.shape:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}; "
            f"expected {expected} for both."
        )


def check_logits(student_logits: Tensor, name: str, other: Tensor) -> None:
    """Refuse logits of teacher and student that differ in shape.

    Raises:
        ShapeError: names both shapes.
    """
    check_same_shape("student_logits", student_logits, name, other, "[B, C]")


def check_setting(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuse a setting outside its range.

    Raises:
        ConfigError: names the setting, what was expected and what was given.
    """
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {value!r}; correct it in its section of `loss`.")
