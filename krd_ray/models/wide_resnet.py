"""Answers what a wide residual network (WRN-depth-width) for small images computes.

Does not hold the classification layer or the names (`outputs.Classifier` and `registry` do).
Shapes: B batch, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from krd_ray.models.cifar_resnet import conv3x3


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))).

    Where the block changes shape, a 1x1 convolution of relu(bn(x)) takes the place of x.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(num_in)
        self.conv1 = conv3x3(num_in, num_out, stride)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.conv2 = conv3x3(num_out, num_out)
        self.project: nn.Conv2d | None = None
        if num_in != num_out or stride != 1:
            self.project = nn.Conv2d(num_in, num_out, kernel_size=1, stride=stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active = F.relu(self.bn1(x_BCHW))
        around: Tensor = x_BCHW if self.project is None else self.project(active)
        inner: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return around + inner


class WideResNet(nn.Module):
    """3x3 stem of 16 channels, three stages of (depth - 4) / 6 blocks, batch norm, ReLU, average pool.

    Stages are 16k, 32k and 64k wide, k = `width`; stages 2 and 3 halve the side; any input side works.

    Args:
        depth: 6n + 4 for a whole n >= 1, such as 16 or 40.
        width: k >= 1; the feature dimension is 64k.
    Source: Zagoruyko and Komodakis 2016 (arXiv:1605.07146), table 1, block B(3, 3). Deviation: no dropout.

    Example:
        >>> import torch
        >>> tuple(WideResNet(depth=10, width=1)(torch.zeros(2, 3, 8, 8)).shape)
        (2, 64)
    """

    def __init__(self, *, depth: int, width: int) -> None:
        super().__init__()
        blocks_per_stage, rest = divmod(depth - 4, 6)
        assert blocks_per_stage >= 1, f"depth {depth} is too small"
        assert rest == 0, f"depth {depth} is not 6n + 4"
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.feature_dim: int = widths[-1]
        self.stem = conv3x3(3, widths[0])
        blocks: list[nn.Module] = []
        for num_in, num_out, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
            blocks.append(PreActivationBlock(num_in, num_out, stride))
            blocks.extend(PreActivationBlock(num_out, num_out, 1) for _ in range(blocks_per_stage - 1))
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(self.feature_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps_BCHW = F.relu(self.bn(self.blocks(self.stem(images_BCHW))))
        return maps_BCHW.mean(dim=(2, 3))
