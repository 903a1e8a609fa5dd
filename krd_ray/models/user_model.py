"""Answers how a user's own model, named `my_pkg.my_mod:fn`, is imported, built and checked.

Does not install packages or change the import path.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models.outputs import ModelOutput
from krd_ray.models.torchvision_import import make_torchvision_importable

USER_MODEL_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
NUM_PROBE_IMAGES = 2


class UserModel(nn.Module):
    """A user's network whose output is turned into a `ModelOutput`; its weights are saved below `net.`.

    Args:
        net: images [B, 3, H, W] -> (logits [B, C], features [B, D]), as any tuple of the two.
        feature_dim: D.
    """

    def __init__(self, net: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.net = net
        self.feature_dim: int = feature_dim

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        logits, features = self.net(images_BCHW)
        return ModelOutput(logits=logits, features=features)


def build_user_model(path: str, *, num_classes: int, image_size: int) -> UserModel:
    """Imports `fn`, calls it as fn(num_classes=..., image_size=...) and tries the module on two black images.

    Args:
        path: `my_pkg.my_mod:fn`, importable from where the process runs.
        num_classes: C.
        image_size: side in pixels.
    Returns:
        The module, ready to train, giving `ModelOutput`.
    Raises:
        ConfigError: cannot be imported, does not take the two arguments, does not return a module, or the
            module's output is not logits [B, C] and features [B, D]; the message says which.
    """
    fn = _import_fn(path)
    try:
        inspect.signature(fn).bind(num_classes=num_classes, image_size=image_size)
    except TypeError as error:
        raise ConfigError(
            f"model '{path}' is called as fn(num_classes=..., image_size=...), "
            f"but its signature does not allow that: {error}"
        ) from error
    net = fn(num_classes=num_classes, image_size=image_size)
    if not isinstance(net, nn.Module):
        raise ConfigError(f"model '{path}' must return a torch.nn.Module, returned {type(net).__name__}")
    output = _try_forward(path, net, image_size)
    return UserModel(net, _check_output(path, output, num_classes))


def _import_fn(path: str) -> Callable[..., Any]:
    module_name, _, fn_name = path.partition(":")
    make_torchvision_importable()  # the user's module may import it
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model '{path}': cannot import {module_name}: {error}; install it, or put its folder on "
            "PYTHONPATH on every node"
        ) from error
    fn = getattr(module, fn_name, None)
    if not callable(fn):
        near = difflib.get_close_matches(fn_name, [name for name in vars(module) if name[0] != "_"])
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"model '{path}': {module_name} has no callable '{fn_name}'{hint}")
    return fn  # type: ignore[no-any-return]


def _try_forward(path: str, net: nn.Module, image_size: int) -> object:
    first = next(net.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    images_BCHW = torch.zeros(NUM_PROBE_IMAGES, 3, image_size, image_size, device=device)
    was_training = {module: module.training for module in net.modules()}
    try:
        with torch.no_grad():
            output: object = net.eval()(images_BCHW)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model '{path}' failed on a batch of {NUM_PROBE_IMAGES} RGB images of "
            f"{image_size}x{image_size} pixels: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, training in was_training.items():
            module.training = training
    return output


def _check_output(path: str, output: object, num_classes: int) -> int:
    expected = f"expected logits [B, {num_classes}] and features [B, D], floating point, as a tuple of two"
    if not isinstance(output, tuple) or len(output) != 2:
        raise ConfigError(f"model '{path}' returned {_describe(output)}; {expected}")
    logits, features = output
    for part in (logits, features):
        is_matrix = isinstance(part, Tensor) and part.ndim == 2 and part.is_floating_point()
        if not is_matrix or part.shape[0] != NUM_PROBE_IMAGES:
            raise ConfigError(
                f"model '{path}' returned {_describe(output)} for {NUM_PROBE_IMAGES} images; {expected}"
            )
    if logits.shape[1] != num_classes:
        raise ConfigError(f"model '{path}' returned logits for {logits.shape[1]} classes; {expected}")
    return int(features.shape[1])


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {list(output.shape)}"
    if isinstance(output, tuple):
        return f"a tuple of ({', '.join(_describe(part) for part in output)})"
    return f"a {type(output).__name__}"
