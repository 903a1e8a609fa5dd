"""Answers what a model costs, parameters and FLOPs, and how to build one without memory for its weights.

Does not measure time or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# What initialisers end in: nothing to do for a tensor without values; skipping saves a quarter of the time.
FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.mul_, Tensor.add_)


class EmptyTensorsOnMeta(TorchFunctionMode):
    """While active, `torch.empty`, where weights are allocated, gives tensors without storage.

    `torch.device("meta")` would move every new tensor, also those that a constructor computes its layer
    sizes with (torchvision's RegNet), and a tensor without storage has no values to read.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], AnyModule]) -> AnyModule:
    """Builds a module whose parameters and buffers have shapes but no storage.

    Args:
        build: makes the module; torch's global generator is left as it was.
    Returns:
        The module, all of it on the meta device.

    Example:
        >>> build_on_meta(lambda: nn.Linear(100_000, 100_000)).weight.device.type
        'meta'
    """
    with torch.random.fork_rng(devices=[]), EmptyTensorsOnMeta():
        return build().to("meta")


def count_params(model: nn.Module) -> int:
    """Counts the elements of all parameters, shared ones once.

    Example:
        >>> count_params(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, *, image_size: int) -> int:
    """Counts the FLOPs of one forward in evaluation mode for one RGB image.

    A multiply-add counts 2; matrix products, convolutions and attention count, the rest (batch norm,
    activations, pooling, bias) does not. Tables that print multiply-adds ("GMACs") show half of this.

    Args:
        model: on any device, meta included; its training mode is left as it was.
        image_size: side in pixels.
    Returns:
        FLOPs, as `torch.utils.flop_counter` counts them.

    Example:
        >>> count_flops(nn.Conv2d(3, 4, kernel_size=1), image_size=10)  # 2 * 3 * 4 * 100
        2400
    """
    first = next(model.parameters(), None)
    images_BCHW = torch.zeros(1, 3, image_size, image_size, device=None if first is None else first.device)
    was_training = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False)
    try:
        # Gradients stay on: without them attention takes a fused kernel that the counter does not know.
        with torch.enable_grad(), counter:
            model.eval()(images_BCHW)
    finally:
        for module, training in was_training.items():
            module.training = training
    return counter.get_total_flops()
