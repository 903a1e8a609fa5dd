"""Answers how a loss changes the weights: learning rate, autocast, scaled and clipped gradients.

Does not compute losses or decide what is trained on.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from krd_ray.config import TrainConfig
from krd_ray.train.student import build_optimizer, lr_factor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Descent:
    """Optimiser, gradient scaler and schedule of one student.

    Args:
        module: whose parameters are trained; on its device already.
        train: settings; nothing left on `auto`.
        device: of the module.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, device: torch.device) -> None:
        self._module, self._train, self._device = module, train, device
        self._factor = lr_factor(train)
        self.optimizer = build_optimizer(module, train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, epochs_done: float) -> None:
        """Follows the schedule; fractions of an epoch count."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._train.lr * self._factor(epochs_done)

    def autocast(self) -> Any:
        """Returns the context of the forward pass."""
        dtype = AUTOCAST.get(self._train.precision)
        return torch.autocast(self._device.type, dtype) if dtype else nullcontext()

    def step(self, loss: Tensor) -> None:
        """Takes one step down the gradient of the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self._train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._module.parameters(), self._train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
