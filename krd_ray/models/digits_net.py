"""Answers what `digits_net_<width>` computes: a plain convolutional net for tiny images, fast on a CPU.

Does not hold the classification layer or the names (`outputs.Classifier` and `registry` do).
Shapes: B batch, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from krd_ray.models.cifar_resnet import conv3x3

MIN_WIDTH = 2
MAX_WIDTH = 256


def conv_bn_relu(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    """One stage: 3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(conv3x3(num_in, num_out, stride), nn.BatchNorm2d(num_out), nn.ReLU())


class DigitsNet(nn.Module):
    """Three stages of w, 2w and 4w channels, the second one at half the side, then global average pool.

    Made for 8x8 images and for student families that differ in one number only; any input side works.

    Args:
        width: w, 2 to 256; the feature dimension is 4w.
    Source: this project's own.

    Example:
        >>> import torch
        >>> tuple(DigitsNet(width=4)(torch.zeros(2, 3, 8, 8)).shape)
        (2, 16)
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        assert MIN_WIDTH <= width <= MAX_WIDTH, f"width {width} is outside {MIN_WIDTH}..{MAX_WIDTH}"
        self.feature_dim: int = 4 * width
        self.stages = nn.Sequential(
            conv_bn_relu(3, width, 1),
            conv_bn_relu(width, 2 * width, 2),
            conv_bn_relu(2 * width, 4 * width, 1),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps_BCHW: Tensor = self.stages(images_BCHW)
        return maps_BCHW.mean(dim=(2, 3))
