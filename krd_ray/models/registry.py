"""Answers which model a name stands for, builds it and says what it costs.

Does not load weights: a built model starts from weights that are a function of the seed alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from krd_ray.errors import ConfigError
from krd_ray.models.cifar_resnet import CifarResNet
from krd_ray.models.digits_net import MAX_WIDTH, MIN_WIDTH, DigitsNet
from krd_ray.models.init_weights import init_weights
from krd_ray.models.model_cost import build_on_meta, count_flops, count_params
from krd_ray.models.outputs import Classifier, ModelOutput, feature_dim_of
from krd_ray.models.torchvision_nets import (
    PREFIX,
    REFUSED,
    build_torchvision,
    dry_run_torchvision,
    torchvision_names,
)
from krd_ray.models.user_model import USER_MODEL_PATTERN, build_user_model
from krd_ray.models.wide_resnet import WideResNet

__all__ = ["MODELS", "ModelInfo", "ModelOutput", "build_model", "describe_model", "list_models"]

MIN_SIDE = 8
MIN_CLASSES = 2
DIGITS_NET_PATTERN = re.compile(r"digits_net_([1-9]\d*)")
THIN_PATTERN = re.compile(r"resnet([1-9]\d*)_w([1-9]\d*)")

Kind = Literal["own", "torchvision", "users"]
Backbone = CifarResNet | WideResNet | DigitsNet


@dataclass(frozen=True)
class ModelRecord:
    """One of krd_ray's own networks: what makes its backbone, and the paper it is from."""

    fn: Callable[[], Backbone]
    source: str


class ModelInfo(NamedTuple):
    """What a model costs: parameters, FLOPs of one forward for one image, feature dimension D."""

    name: str
    num_params: int
    num_flops: int
    feature_dim: int


def build_model(name: str, *, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Builds a model by name, on the CPU, ready to train.

    Args:
        name: one of `list_models(include_torchvision=True)`, `digits_net_<width>`, `resnet<depth>_w<width>`,
            or a user's own
            `my_pkg.my_mod:fn`, called as fn(num_classes=..., image_size=...).
        num_classes: C >= 2.
        image_size: side of the square RGB images, pixels; >= 8 for krd_ray's own networks.
        seed: the weights are a function of it (and of torch's version) alone, provided a user's `fn` draws
            from torch's generator only. The global generators are left as they were.
    Returns:
        A module: images [B, 3, H, W], float -> `ModelOutput`; its attribute `feature_dim` is D.
    Raises:
        ConfigError: unknown name (with the nearest ones), a side or class count that the model cannot take,
            or a user's model that does not keep to the contract.

    Example:
        >>> model = build_model("digits_net_8", num_classes=10, image_size=8, seed=0)
        >>> logits, features = model(torch.zeros(2, 3, 8, 8))
        >>> tuple(logits.shape), tuple(features.shape)
        ((2, 10), (2, 32))
    """
    kind = _checked_kind(name, num_classes, image_size)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would also seed the GPUs' generators, which are not restored here.
        torch.default_generator.manual_seed(seed)
        if kind == "own":
            return _build_own(name, num_classes)
        if kind == "torchvision":
            bare_name = name.removeprefix(PREFIX)
            return build_torchvision(bare_name, num_classes=num_classes, image_size=image_size)
        return build_user_model(name, num_classes=num_classes, image_size=image_size)


def list_models(*, include_torchvision: bool = False) -> list[str]:
    """Lists the names that `build_model` takes; of `digits_net_<width>` only the usual widths.

    Args:
        include_torchvision: also list torchvision's, as `torchvision:<name>`; imports torchvision.

    Example:
        >>> list_models()[:3]
        ['resnet8', 'resnet20', 'resnet32']
    """
    names = list(MODELS)
    if include_torchvision:
        names += [PREFIX + name for name in torchvision_names()]
    return names


def lines_of_models(num_classes: int, image_size: int, *, include_torchvision: bool) -> Iterator[str]:
    """Yields a line per model with its parameters and FLOPs; torchvision's are named only."""
    for name in list_models(include_torchvision=include_torchvision):
        if name.startswith(PREFIX):
            yield name
            continue
        info = describe_model(name, num_classes=num_classes, image_size=image_size)
        yield f"{name:<16} {info.num_params / 1e6:8.3f} M parameters {info.num_flops / 1e6:10.1f} MFLOPs"


def describe_model(name: str, *, num_classes: int, image_size: int) -> ModelInfo:
    """Says what a model costs; no memory is allocated for weights, except for a user's own model.

    FLOPs are those of `model_cost.count_flops`: one image, evaluation mode, a multiply-add counts 2.

    Args:
        name: as for `build_model`.
        num_classes: C >= 2.
        image_size: side in pixels.
    Raises:
        ConfigError: as for `build_model`.

    Example:
        >>> describe_model("resnet20", num_classes=10, image_size=32).num_params
        269722
    """
    kind = _checked_kind(name, num_classes, image_size)
    model: nn.Module
    if kind == "torchvision":
        model, num_flops = dry_run_torchvision(
            name.removeprefix(PREFIX), num_classes=num_classes, image_size=image_size
        )
    else:
        if kind == "own":
            model = build_on_meta(lambda: _build_own(name, num_classes))
        else:
            model = build_model(name, num_classes=num_classes, image_size=image_size, seed=0)
        num_flops = count_flops(model, image_size=image_size)
    return ModelInfo(name, count_params(model), num_flops, feature_dim_of(model))


def _build_own(name: str, num_classes: int) -> Classifier:
    backbone = _own_record(name).fn()
    model = Classifier(backbone, nn.Linear(backbone.feature_dim, num_classes))
    init_weights(model)
    return model


def _own_record(name: str) -> ModelRecord:
    sized = THIN_PATTERN.fullmatch(name)
    if sized is not None:
        return _sized(name, depth=int(sized[1]), width=int(sized[2]))
    width = DIGITS_NET_PATTERN.fullmatch(name)
    if width is None:
        return MODELS[name]
    if not MIN_WIDTH <= int(width[1]) <= MAX_WIDTH:
        raise ConfigError(f"model '{name}': the width must be {MIN_WIDTH} to {MAX_WIDTH}, got {width[1]}")
    return _digits_net(int(width[1]))


def _checked_kind(name: str, num_classes: int, image_size: int) -> Kind:
    kind = _kind_of(name)
    if num_classes < MIN_CLASSES:
        raise ConfigError(f"model '{name}' needs num_classes >= {MIN_CLASSES}, got {num_classes}")
    min_side = MIN_SIDE if kind == "own" else 1
    if image_size < min_side:
        raise ConfigError(
            f"model '{name}' needs images of at least {min_side} pixels a side, got {image_size}"
        )
    return kind


def _kind_of(name: str) -> Kind:
    if name in MODELS or DIGITS_NET_PATTERN.fullmatch(name) or THIN_PATTERN.fullmatch(name):
        return "own"
    if name.startswith(PREFIX):
        if name.removeprefix(PREFIX) in {*torchvision_names(), *REFUSED}:
            return "torchvision"
    elif USER_MODEL_PATTERN.fullmatch(name) and not name.startswith("torchvision."):
        return "users"
    raise ConfigError(_unknown_name_message(name))


def _unknown_name_message(name: str) -> str:
    full_names = {full.removeprefix(PREFIX): full for full in list_models(include_torchvision=True)}
    near = difflib.get_close_matches(name.rpartition(":")[2], full_names, n=3)
    hint = (
        f"nearest: {', '.join(full_names[bare] for bare in near)}" if near else "nothing is spelled like it"
    )
    own = [own_name for own_name in MODELS if not DIGITS_NET_PATTERN.fullmatch(own_name)]
    return (
        f"there is no model '{name}'; {hint}. Expected one of {', '.join(own)}, digits_net_<width>, "
        f"resnet<depth>_w<width>, {PREFIX}<name>, or your own as my_pkg.my_mod:fn"
    )


HE_2015 = "He et al. 2015 (arXiv:1512.03385), section 4.2, shortcut option A"
TIAN_2019 = "Tian et al. 2019 (arXiv:1910.10699), widths 32, 64, 128, 256, shortcut option B"
WRN_2016 = "Zagoruyko and Komodakis 2016 (arXiv:1605.07146), table 1, no dropout"
X4_WIDTHS = (32, 64, 128, 256)


def _thin(blocks_per_stage: int) -> ModelRecord:
    return ModelRecord(partial(CifarResNet, blocks_per_stage=blocks_per_stage), HE_2015)


def _sized(name: str, *, depth: int, width: int) -> ModelRecord:
    """resnet<depth>_w<width>: widths w, w, 2w, 4w; w = 16 is He et al.'s."""
    if depth < 8 or depth % 6 != 2 or not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ConfigError(
            f"model '{name}': the depth must be 6n + 2 (8, 14, 20, ...) and the width {MIN_WIDTH} to {MAX_WIDTH}"
        )
    widths = (width, width, 2 * width, 4 * width)
    return ModelRecord(partial(CifarResNet, blocks_per_stage=(depth - 2) // 6, widths=widths), HE_2015)


def _x4(blocks_per_stage: int) -> ModelRecord:
    return ModelRecord(
        partial(CifarResNet, blocks_per_stage=blocks_per_stage, widths=X4_WIDTHS, shortcut="project"),
        TIAN_2019,
    )


def _wide(depth: int, width: int) -> ModelRecord:
    return ModelRecord(partial(WideResNet, depth=depth, width=width), WRN_2016)


def _digits_net(width: int) -> ModelRecord:
    return ModelRecord(partial(DigitsNet, width=width), "this project's own")


MODELS: dict[str, ModelRecord] = {
    "resnet8": _thin(1),
    "resnet20": _thin(3),
    "resnet32": _thin(5),
    "resnet56": _thin(9),
    "resnet110": _thin(18),
    "resnet8x4": _x4(1),
    "resnet32x4": _x4(5),
    "wrn_16_2": _wide(depth=16, width=2),
    "wrn_40_2": _wide(depth=40, width=2),
    "digits_net_4": _digits_net(4),
    "digits_net_8": _digits_net(8),
    "digits_net_16": _digits_net(16),
    "digits_net_32": _digits_net(32),
    "digits_net_64": _digits_net(64),
}
