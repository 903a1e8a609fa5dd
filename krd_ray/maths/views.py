"""Answers which pixels a network sees: a view is a pure function of (image, id, view index, spec).

Does not read images, move them between devices or hold state; a view depends on nothing else in its batch.

Shapes: B batch, H and W source rows and columns, S output side, C = 3 colour channels (RGB).

How bit-identity is kept, whatever the batch, its order or the thread count (and, as built but not yet run, the
device): draws are integer hashes; geometry is integer arithmetic; pixels meet only correctly rounded float32
operations, one kernel each (no fused multiply-add, no matrix product); the one reduction (grey level) sums
integers. A compiler that fuses these steps would break the promise: call the views outside `torch.compile`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths.view_pixels import Box, colour_jitter, crop_native, normalise, resample

Recipe = Literal["none", "pad_crop", "random_resized_crop"]
VIEW_VERSION = 1  # raise it when any pixel of any view changes: it is part of every key
RATIO_STEPS = 1024  # the log-uniform aspect ratio is read from a table: exp() may differ between vector lanes

DRAW_TOP, DRAW_LEFT, DRAW_FLIP, DRAW_AREA, DRAW_RATIO = range(5)
DRAW_BRIGHTNESS, DRAW_CONTRAST, DRAW_SATURATION = range(5, 8)

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True)
class ViewSpec:
    """Everything that decides a view's pixels; hashable, and named by `key()`. By default nothing is random.

    Args:
        recipe: "none" (centred square, resampled if its size differs), "pad_crop" (zero padding, then a
            random crop at native scale), "random_resized_crop" (random box resampled to the output side).
        side: output height and width, pixels.
        seed: view seed in [0, 2^63).
        mean, std: per RGB channel, in [0, 1] units; the output is (x / 255 - mean) / std.
        pad: black border on each side, pixels; "pad_crop" only.
        flip: mirror left and right with probability 1/2.
        scale, ratio: (min, max) area fraction and aspect ratio (width / height); "random_resized_crop" only.
        brightness, contrast, saturation: jitter strengths; each factor is uniform in [max(0, 1 - s), 1 + s].
    Raises:
        ConfigError: a value is out of range; the message names the dotted path (`views.pad`).
    """

    recipe: Recipe
    side: int
    seed: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: int = 0
    flip: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mean", "std", "scale", "ratio"):  # lists and ints from YAML: one spec, one key
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name in ("brightness", "contrast", "saturation"):
            object.__setattr__(self, name, float(getattr(self, name)))
        _check_spec(self)

    def key(self) -> str:
        """Name of the pixels: 64 hex digits over every field and the version of this file's arithmetic."""
        content = {"version": VIEW_VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def counter_uniform(seed: int, sample_ids: Tensor, view_index: Tensor, draw: int) -> Tensor:
    """Uniform numbers that are a pure function of their coordinates: no generator, no state, any order.

        u = (h >> 11) / 2^53,   h = m(m(m(m(seed) ^ draw) ^ id) ^ view),   m(x) = mix(x + gamma)

    Args:
        seed: any integer; its low 64 bits count.
        sample_ids: [B] int64.
        view_index: [B] int64, same device.
        draw: which number of this view; different draws are independent.
    Returns:
        [B] float64 in [0, 1), bit-identical on every device.
    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators": splitmix64.
        Deviation: a chain over four words instead of one counter.
    Example:
        >>> ids = torch.tensor([7, 8, 9])
        >>> u = counter_uniform(1, ids, torch.zeros_like(ids), draw=0)
        >>> bool(torch.equal(u[1:], counter_uniform(1, ids[1:], torch.zeros_like(ids[1:]), draw=0)))
        True
    """
    start = _mix_int(_mix_int(seed & _MASK64) ^ (draw & _MASK64))
    hashed = _mix_tensor(sample_ids ^ _signed(start))
    hashed = _mix_tensor(hashed ^ view_index)
    return _shift_right(hashed, 11).to(torch.float64) * 2.0**-53


def train_view(images_BHWC: Tensor, sample_ids: Tensor, view_index: int | Tensor, spec: ViewSpec) -> Tensor:
    """View number `view_index` of each image: crop, flip, colour jitter, normalise.

    A sample's output is bit-identical whatever else is in the batch. Works on the images' own device.

    Args:
        images_BHWC: [B, H, W, 3] uint8.
        sample_ids: [B] int64, unique and stable.
        view_index: one integer for all, or [B] int64.
        spec: the view spec.
    Returns:
        [B, 3, S, S] float32, normalised, in the layout `torch.channels_last`.
    Raises:
        ShapeError: images are not [B, H, W, 3], ids are not [B], or the crop exceeds the padded image.
        DataError: images are not uint8.
    Source: crop and flip as torchvision RandomCrop / RandomHorizontalFlip / RandomResizedCrop / ColorJitter.
        Deviations: one try per random box, cut at the border (torchvision tries ten); aspect ratio in 1024
        log-uniform steps; jitter in the fixed order brightness, contrast, saturation, without rounding to
        uint8 between steps; box resampling averages a bilinear interpolant over each output pixel.
    Example:
        >>> spec = ViewSpec("pad_crop", 4, seed=0, mean=(0, 0, 0), std=(1, 1, 1), pad=1, flip=True)
        >>> train_view(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([5, 6]), 0, spec).shape
        torch.Size([2, 3, 4, 4])
    """
    _check_images(images_BHWC)
    ids, views = _coordinates(images_BHWC, sample_ids, view_index)

    def draw(number: int) -> Tensor:
        return counter_uniform(spec.seed, ids, views, number)

    flipped = draw(DRAW_FLIP) < 0.5 if spec.flip else torch.zeros_like(ids, dtype=torch.bool)
    if spec.recipe == "pad_crop":
        spare_rows, spare_cols = _spare(images_BHWC, spec)
        top, left = _below(draw(DRAW_TOP), spare_rows + 1), _below(draw(DRAW_LEFT), spare_cols + 1)
        x_BHWC = crop_native(images_BHWC, top - spec.pad, left - spec.pad, flipped, spec.side)
    elif spec.recipe == "random_resized_crop":
        height, width = images_BHWC.shape[1:3]
        uniform = [draw(number) for number in (DRAW_AREA, DRAW_RATIO, DRAW_TOP, DRAW_LEFT)]
        box = _random_box(*uniform, height=height, width=width, spec=spec)
        x_BHWC = resample(images_BHWC, box, flipped, spec.side)
    else:
        x_BHWC = _centre_square(images_BHWC, flipped, spec.side)
    if spec.brightness or spec.contrast or spec.saturation:
        jitter = (
            (DRAW_BRIGHTNESS, spec.brightness),
            (DRAW_CONTRAST, spec.contrast),
            (DRAW_SATURATION, spec.saturation),
        )
        factors = [_jitter_factor(draw(number), s) if s else None for number, s in jitter]
        x_BHWC = colour_jitter(x_BHWC.to(torch.float32), *factors)
    return normalise(x_BHWC, spec.mean, spec.std)


def eval_view(images_BHWC: Tensor, spec: ViewSpec) -> Tensor:
    """The one view without randomness, for evaluation: centred, normalised.

    "pad_crop" keeps the native scale and takes the centre; other recipes resample the largest centred square.
    An S x S image passes through unchanged but for normalisation.

    Args:
        images_BHWC: [B, H, W, 3] uint8.
        spec: the view spec; its seed, flip and jitter do not matter here.
    Returns:
        [B, 3, S, S] float32, normalised, in the layout `torch.channels_last`.
    Raises:
        ShapeError, DataError: as `train_view`.
    """
    _check_images(images_BHWC)
    origin = torch.zeros(images_BHWC.shape[0], dtype=torch.int64, device=images_BHWC.device)
    unflipped = origin.bool()
    if spec.recipe == "pad_crop":
        spare_rows, spare_cols = _spare(images_BHWC, spec)
        top, left = origin + (spare_rows // 2 - spec.pad), origin + (spare_cols // 2 - spec.pad)
        x_BHWC = crop_native(images_BHWC, top, left, unflipped, spec.side)
    else:
        x_BHWC = _centre_square(images_BHWC, unflipped, spec.side)
    return normalise(x_BHWC, spec.mean, spec.std)


# ---- draws


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (torch's own `>>` copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x = (x + _GAMMA) & _MASK64
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK64
    return x ^ (x >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix_int` on int64 tensors; sums and products wrap modulo 2^64 on every device."""
    x = x + _signed(_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _below(uniform: Tensor, limit: int | Tensor) -> Tensor:
    """Uniform integers in [0, limit) from uniform numbers in [0, 1)."""
    return (uniform * limit).floor().to(torch.int64)


def _jitter_factor(uniform: Tensor, strength: float) -> Tensor:
    """[B] float32 in [max(0, 1 - strength), 1 + strength]."""
    low = max(0.0, 1.0 - strength)
    return (uniform * (1.0 + strength - low) + low).to(torch.float32)


# ---- geometry (integers only)


def _spare(images_BHWC: Tensor, spec: ViewSpec) -> tuple[int, int]:
    """How many rows and columns the padded image has more than the crop."""
    spare = [images_BHWC.shape[axis] + 2 * spec.pad - spec.side for axis in (1, 2)]
    if min(spare) < 0:
        raise ShapeError(
            f"views.side is {spec.side}, but images of {tuple(images_BHWC.shape[1:3])} are smaller, "
            f"even with views.pad {spec.pad} on each side. Raise views.pad or lower views.side."
        )
    return spare[0], spare[1]


def _centre_square(images_BHWC: Tensor, flipped: Tensor, side: int) -> Tensor:
    """[B, S, S, 3] the largest centred square; resampled only where the image is not S x S already."""
    num_images, height, width = images_BHWC.shape[:3]
    source_side = min(height, width)
    top, left, length = (
        torch.full((num_images,), value, device=images_BHWC.device)
        for value in ((height - source_side) // 2, (width - source_side) // 2, source_side)
    )
    if source_side == side:
        return crop_native(images_BHWC, top, left, flipped, side)
    return resample(images_BHWC, Box(top, left, length, length), flipped, side)


def _random_box(
    u_area: Tensor, u_ratio: Tensor, u_top: Tensor, u_left: Tensor, *, height: int, width: int, spec: ViewSpec
) -> Box:
    """Boxes of random area and aspect ratio, cut at the border, at a uniform place inside the image."""
    root_ratio = _root_ratios(spec.ratio, u_ratio.device)[_below(u_ratio, RATIO_STEPS)]
    area_frac = u_area * (spec.scale[1] - spec.scale[0]) + spec.scale[0]
    root_area = (area_frac * float(height * width)).sqrt()  # sqrt is correctly rounded everywhere; exp is not
    box_height = (root_area / root_ratio).round().clamp(1, height).to(torch.int64)
    box_width = (root_area * root_ratio).round().clamp(1, width).to(torch.int64)
    top, left = _below(u_top, height + 1 - box_height), _below(u_left, width + 1 - box_width)
    return Box(top, left, box_height, box_width)


@functools.lru_cache(maxsize=16)
def _root_ratios(ratio: tuple[float, float], device: torch.device) -> Tensor:
    """[RATIO_STEPS] float64: roots of aspect ratios at equal steps of their logarithm; kept for the next batch."""
    growth = ratio[1] / ratio[0]
    table = [math.sqrt(ratio[0] * growth ** ((k + 0.5) / RATIO_STEPS)) for k in range(RATIO_STEPS)]
    return torch.tensor(table, dtype=torch.float64, device=device)


# ---- checks


def _coordinates(images_BHWC: Tensor, sample_ids: Tensor, view_index: int | Tensor) -> tuple[Tensor, Tensor]:
    """Ids and view indices as [B] int64 on the images' device."""
    shape, device = images_BHWC.shape[:1], images_BHWC.device
    views = torch.full(shape, view_index, device=device) if isinstance(view_index, int) else view_index
    for name, tensor in (("sample_ids", sample_ids), ("view_index", views)):
        if tensor.shape != shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, but images have {tuple(images_BHWC.shape)}: "
                "one value per image is expected."
            )
        if tensor.is_floating_point():
            raise DataError(
                f"{name} must be int64, got {tensor.dtype}: floats cannot name large ids exactly."
            )
    return sample_ids.to(device, torch.int64), views.to(device, torch.int64)


def _check_images(images_BHWC: Tensor) -> None:
    if images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3:
        raise ShapeError(
            f"images must be [B, H, W, 3] (RGB, channels last), got {tuple(images_BHWC.shape)}. "
            "Convert greyscale to RGB and permute [B, 3, H, W] first."
        )
    if images_BHWC.dtype != torch.uint8:
        raise DataError(
            f"images must be uint8 in [0, 255], got {images_BHWC.dtype}. Views normalise themselves."
        )


def _check_spec(spec: ViewSpec) -> None:
    """Refuse a spec out of range, naming the setting."""
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    low_s, high_s = spec.scale if len(spec.scale) == 2 else (math.nan, math.nan)
    low_r, high_r = spec.ratio if len(spec.ratio) == 2 else (math.nan, math.nan)
    rules = (
        ("recipe", spec.recipe in get_args(Recipe), f"one of {', '.join(get_args(Recipe))}", spec.recipe),
        ("side", spec.side >= 1, ">= 1", spec.side),
        ("seed", 0 <= spec.seed < 1 << 63, "in [0, 2^63)", spec.seed),
        ("pad", spec.pad >= 0, ">= 0", spec.pad),
        ("scale", 0 < low_s <= high_s <= 1, "(min, max) with 0 < min <= max <= 1", spec.scale),
        ("ratio", 0 < low_r <= high_r < math.inf, "(min, max) with 0 < min <= max", spec.ratio),
        ("mean", len(spec.mean) == 3 and all(map(math.isfinite, spec.mean)), "3 finite numbers", spec.mean),
        ("std", len(spec.std) == 3 and all(0 < v < math.inf for v in spec.std), "3 numbers > 0", spec.std),
        *(
            (name, 0 <= strength < math.inf, ">= 0 and finite", strength)
            for name, strength in zip(("brightness", "contrast", "saturation"), strengths, strict=True)
        ),
    )
    for name, holds, expected, got in rules:
        if not holds:
            raise ConfigError(f"views.{name} must be {expected}, got {got!r}")
