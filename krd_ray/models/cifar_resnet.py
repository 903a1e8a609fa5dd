"""Answers what a CIFAR-style residual network computes: resnet8 to resnet110, resnet8x4 and resnet32x4.

Does not hold the classification layer or the names (`outputs.Classifier` and `registry` do).
Shapes: B batch, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "project"]


def conv3x3(num_in: int, num_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and no bias (a batch norm follows or comes before)."""
    return nn.Conv2d(num_in, num_out, kernel_size=3, stride=stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Shortcut option A: every `stride`-th pixel, the new channels zero; no parameters."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_new = num_out - num_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kept = x_BCHW[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.num_new))


def make_shortcut(kind: Shortcut, num_in: int, num_out: int, stride: int) -> nn.Module:
    """The path around a block: identity where the shape stays, else option A (pad) or B (project)."""
    if num_in == num_out and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(num_in, num_out, stride)
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(num_out)
    )


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, num_in: int, num_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(num_in, num_out, stride)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = conv3x3(num_out, num_out)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = make_shortcut(shortcut, num_in, num_out, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.shortcut(x_BCHW) + self.bn2(self.conv2(inner)))


class CifarResNet(nn.Module):
    """3x3 stem, three stages of n basic blocks, global average pool: 6n + 2 layers with the head.

    Stages 2 and 3 halve the side; any input side works.

    Args:
        blocks_per_stage: n >= 1; depth is 6n + 2.
        widths: channels of the stem and of the three stages; the last one is the feature dimension.
        shortcut: where a block changes shape: "pad" (option A, no parameters) or "project" (option B,
            1x1 convolution and batch norm).
    Source: He et al. 2015 (arXiv:1512.03385), section 4.2: widths 16, 16, 32, 64 and option A. The x4 nets:
        Tian et al. 2019 (arXiv:1910.10699), widths 32, 64, 128, 256 and option B. Deviation: none.

    Example:
        >>> import torch
        >>> tuple(CifarResNet(blocks_per_stage=1)(torch.zeros(2, 3, 8, 8)).shape)
        (2, 64)
    """

    def __init__(
        self,
        *,
        blocks_per_stage: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        shortcut: Shortcut = "pad",
    ) -> None:
        super().__init__()
        self.feature_dim: int = widths[-1]
        self.stem = nn.Sequential(conv3x3(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        for num_in, num_out, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
            blocks.append(BasicBlock(num_in, num_out, stride, shortcut))
            blocks.extend(BasicBlock(num_out, num_out, 1, shortcut) for _ in range(blocks_per_stage - 1))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps_BCHW: Tensor = self.blocks(self.stem(images_BCHW))
        return maps_BCHW.mean(dim=(2, 3))
