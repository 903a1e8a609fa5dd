"""Answers what is trained: the network with its projector, its optimiser, its learning-rate schedule.

Does not loop (`loop` does).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from krd_ray.config import TrainConfig
from krd_ray.models.outputs import feature_dim_of
from krd_ray.models.registry import build_model


class Student(nn.Module):
    """A network and, where its features are compared with a teacher's, a linear projector that export drops.

    Args:
        net: returns (logits [B, C], features [B, D_s]).
        teacher_dim: D_t; None builds no projector.
        seed: of the projector's initial weights.
    """

    def __init__(self, net: nn.Module, teacher_dim: int | None, seed: int) -> None:
        super().__init__()
        self.net = net
        self.projector: nn.Linear | None = None
        if teacher_dim is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projector = nn.Linear(feature_dim_of(net), teacher_dim, bias=False)

    def forward(self, view_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits [B, C] and projected features [B, D_t], None without a projector."""
        logits, features = self.net(view_BCHW)
        return logits, None if self.projector is None else self.projector(features)


def build_student(model: str, *, num_classes: int, side: int, seed: int, teacher_dim: int | None) -> Student:
    """Builds a student whose weights are a pure function of (model, seed)."""
    net = build_model(model, num_classes=num_classes, image_size=side, seed=seed)
    return Student(net, teacher_dim, seed)


def layout_of(train: TrainConfig) -> torch.memory_format:
    """Returns how weights and views lie in memory."""
    return torch.channels_last if train.channels_last else torch.contiguous_format


def build_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimiser; biases and normalisation weights (one-dimensional) are not decayed."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov)


def lr_factor(train: TrainConfig) -> Callable[[float], float]:
    """Returns the schedule: epochs done, as a fraction too, -> factor on the learning rate.

    Linear warm-up over `warmup_epochs`, then constant, steps by gamma at the milestones, or half a cosine.

    Example:
        >>> factor = lr_factor(TrainConfig(epochs=10, schedule="cosine"))
        >>> factor(0.0), round(factor(5.0), 3)
        (1.0, 0.5)
    """
    milestones = sorted(train.milestones)

    def factor(epoch: float) -> float:
        if epoch < train.warmup_epochs:
            return min((epoch + 1e-3) / train.warmup_epochs, 1.0)
        if train.schedule == "cosine":
            span = max(train.epochs - train.warmup_epochs, 1e-9)
            return 0.5 * (1 + math.cos(math.pi * min((epoch - train.warmup_epochs) / span, 1.0)))
        if train.schedule == "step":
            return float(train.gamma ** bisect.bisect_right(milestones, epoch))
        return 1.0

    return factor
