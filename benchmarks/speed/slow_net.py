"""Answers how a slow student looks to the others: a small net that sleeps before each step.

Does not compute more than the others do, so that it takes no cores from them.
"""

from __future__ import annotations

import time

from torch import Tensor, nn

from krd_ray.models.registry import build_model

NET = "resnet8_w4"
SLEEP_S = 1.1


class SlowNet(nn.Module):
    """A small net that sleeps before each forward in training."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.net = build_model(NET, num_classes=num_classes, image_size=image_size, seed=0)

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            time.sleep(SLEEP_S)
        logits, features = self.net(view)
        return logits, features


def slow_net(num_classes: int, image_size: int) -> nn.Module:
    """Builds the net for `model: benchmarks.speed.slow_net:slow_net`."""
    return SlowNet(num_classes, image_size)
