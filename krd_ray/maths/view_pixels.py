"""Answers how a view's pixels are cut, resampled, coloured and normalised once its parameters are drawn.

Does not draw anything and knows no spec: see `views.py`, its only caller.

Shapes: B batch, H and W source rows and columns, S output side, C = 3 colour channels (RGB).
Every sample is computed alone: integer geometry, correctly rounded float32 operations, one kernel each.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision

CACHE_VALUES = 2**19  # float32 values of one temporary on the CPU, 2 MiB


class Box(NamedTuple):
    """Source rectangle of each sample inside its image, in pixels; every field is [B] int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def crop_native(images_BHWC: Tensor, top: Tensor, left: Tensor, flipped: Tensor, side: int) -> Tensor:
    """Pixels at (top + i, left + j), black outside the image: a crop of the zero-padded image.

    Args:
        images_BHWC: [B, H, W, 3] uint8.
        top, left: [B] int64, may be negative.
        flipped: [B] bool, mirror left and right.
        side: S.
    Returns:
        [B, S, S, 3] uint8, new memory.
    """
    num_images, height, width = images_BHWC.shape[:3]
    row_BS = top[:, None] + torch.arange(side, device=top.device)
    col_BS = left[:, None] + _output_columns(flipped, side)
    sample = torch.arange(num_images, device=top.device)[:, None, None]
    row_in, col_in = row_BS.clamp(0, height - 1), col_BS.clamp(0, width - 1)
    x_BHWC = images_BHWC[sample, row_in[:, :, None], col_in[:, None, :]]
    inside = (row_BS == row_in)[:, :, None, None] & (col_BS == col_in)[:, None, :, None]
    return x_BHWC.mul_(inside)


def resample(images_BHWC: Tensor, box: Box, flipped: Tensor, side: int) -> Tensor:
    """The box as S x S pixels: the bilinear interpolant inside the box, averaged over each output pixel.

    Per axis, k = ceil(image size / S) equally spaced samples per output pixel, so that a box larger than the
    output does not alias. k depends on the image size alone, never on the drawn boxes of the batch.

    Args:
        images_BHWC: [B, H, W, 3] uint8.
        box: source rectangles, inside the images, at least 1 x 1.
        flipped: [B] bool, mirror left and right.
        side: S.
    Returns:
        [B, S, S, 3] float32 in [0, 255].
    """
    num_images, device = len(images_BHWC), images_BHWC.device
    row, column = torch.arange(side, device=device).expand(num_images, side), _output_columns(flipped, side)
    out_BHWC = torch.empty((num_images, side, side, 3), device=device)
    size = _images_at_once(images_BHWC)
    for start in range(0, num_images, size):
        part = slice(start, start + size)
        rows_BSWC = _resample_rows(images_BHWC[part], box.top[part], box.height[part], row[part])
        columns_BWHC = rows_BSWC.transpose(1, 2)
        done_BWHC = _resample_rows(columns_BWHC, box.left[part], box.width[part], column[part])
        out_BHWC[part] = done_BWHC.transpose(1, 2)
    return out_BHWC


def _images_at_once(images_BHWC: Tensor) -> int:
    """A CPU keeps a few images in its cache (5x faster at 256 x 256); a GPU prefers few large kernels."""
    if images_BHWC.device.type != "cpu":
        return max(1, images_BHWC.shape[0])
    return max(1, CACHE_VALUES // max(1, images_BHWC[0:1].numel()))


def _resample_rows(x_BHWC: Tensor, start: Tensor, length: Tensor, position: Tensor) -> Tensor:
    """[B, S, W, 3] float32: rows [start, start + length) of each image as S rows, in the order of `position`.

    Whole rows are copied, never single pixels, so columns are best resampled as rows of the transpose.
    """
    num_images, height, width = x_BHWC.shape[:3]
    side = position.shape[1]
    num_parts = -(-height // side)
    flat = x_BHWC.reshape(num_images * height, width * 3)
    first_row = torch.arange(num_images, device=x_BHWC.device)[:, None] * height
    total = torch.zeros((num_images * side, width * 3), device=x_BHWC.device)
    for part in range(num_parts):
        first, second, weight = _taps(start, length, position, side, part, num_parts)
        near = flat.index_select(0, (first_row + first).flatten()).to(torch.float32)
        step = flat.index_select(0, (first_row + second).flatten()).to(torch.float32)
        step.sub_(near).mul_(weight.reshape(-1, 1))  # not lerp: it may fuse some lanes
        total.add_(near.add_(step))
    return total.mul_(1.0 / num_parts).reshape(num_images, side, width, 3)


def colour_jitter(
    x_BHWC: Tensor, brightness: Tensor | None, contrast: Tensor | None, saturation: Tensor | None
) -> Tensor:
    """Brightness, then contrast (about the mean grey level), then saturation, each cut to [0, 255].

    Args:
        x_BHWC: [B, S, S, 3] float32 in [0, 255]; changed in place.
        brightness, contrast, saturation: [B] float32 factors; None leaves the step out.
    Returns:
        `x_BHWC` itself.
    """
    if brightness is not None:
        x_BHWC.mul_(brightness[:, None, None, None]).clamp_(0.0, 255.0)
    if contrast is not None:
        level_sum = _grey(x_BHWC).round_().to(torch.int64).sum(dim=(1, 2))  # integers: same sum in any order
        num_pixels = torch.full_like(level_sum, x_BHWC.shape[1] * x_BHWC.shape[2]).to(torch.float64)
        level = (level_sum.to(torch.float64) / num_pixels).to(torch.float32)[:, None, None, None]
        x_BHWC.sub_(level).mul_(contrast[:, None, None, None]).add_(level).clamp_(0.0, 255.0)
    if saturation is not None:
        grey = _grey(x_BHWC)[..., None]
        x_BHWC.sub_(grey).mul_(saturation[:, None, None, None]).add_(grey).clamp_(0.0, 255.0)
    return x_BHWC


def normalise(x_BHWC: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - 255 mean) / (255 std), channels first.

    Divides by a tensor, not by a Python number, because a GPU turns the latter into a multiplication.

    Args:
        x_BHWC: [B, S, S, 3], uint8 or float32 in [0, 255].
        mean, std: per channel, in [0, 1] units.
    Returns:
        [B, 3, S, S] float32, new memory in the layout `torch.channels_last`, as the pixels come.
    """
    shift, scale = (_times_255(values, x_BHWC.device) for values in (mean, std))
    x_BCHW = x_BHWC.to(torch.float32, memory_format=torch.contiguous_format, copy=True).permute(0, 3, 1, 2)
    return x_BCHW.sub_(shift[None, :, None, None]).div_(scale[None, :, None, None])


@functools.lru_cache(maxsize=16)
def _times_255(values: tuple[float, ...], device: torch.device) -> Tensor:
    """255 times the values, per channel; kept, because a GPU finishes all its work before it takes new ones."""
    return torch.tensor([255.0 * value for value in values], dtype=torch.float32, device=device)


def _output_columns(flipped: Tensor, side: int) -> Tensor:
    """[B, S] which unflipped column lands in each output column."""
    column = torch.arange(side, device=flipped.device)
    return torch.where(flipped[:, None], side - 1 - column, column)


def _taps(
    start: Tensor, length: Tensor, position: Tensor, side: int, part: int, num_parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Two neighbouring source indices and the second one's float32 weight, each [B, S], for one part.

    Part j of output pixel i samples at (i + (j + 1/2) / k) * length / S - 1/2, kept inside the box.
    """
    denominator = 2 * num_parts * side
    point = (2 * (position * num_parts + part) + 1) * length[:, None] - num_parts * side
    last = length[:, None] - 1
    point = torch.minimum(point.clamp(min=0), denominator * last)
    first = torch.div(point, denominator, rounding_mode="floor")
    weight = (point - first * denominator).to(torch.float32) * (1.0 / denominator)
    second = torch.minimum(first + 1, last)
    return start[:, None] + first, start[:, None] + second, weight


def _grey(x_BHWC: Tensor) -> Tensor:
    """[B, S, S] float32 grey level, always summed in the same order."""
    red, green, blue = (x_BHWC[..., channel] * GREY_WEIGHTS[channel] for channel in range(3))
    return (red + green) + blue
