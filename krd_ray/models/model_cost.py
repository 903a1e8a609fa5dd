"""Answers what a model costs, parameters, FLOPs and time on a CPU, and how to build one without its weights.

Does not measure memory, and no time but that of one image after the other on one CPU thread.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# What initialisers end in: nothing to do for a tensor without values; skipping saves a quarter of the time.
FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.mul_, Tensor.add_)

WARM_UPS, ROUNDS, FORWARDS = 5, 10, 3
BUDGET_S = 6.0


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


def measure_latency_ms(
    models: Mapping[str, nn.Module], *, image_size: int, budget_s: float = BUDGET_S
) -> dict[str, float]:
    """Times one forward of one image on one CPU thread, all models in turns.

        latency = median over up to 10 rounds of 3 forwards; a round visits every model once

    In turns, so that a disturbance of the machine falls on all models alike; the median, so that it counts
    little. What a CPU does for other processes meanwhile is still in the figure.

    Args:
        models: name -> model on the CPU; training modes and torch's thread count are left as they were.
        image_size: side of the RGB image, pixels.
        budget_s: > 0, seconds; once they are spent no further round begins, and half of them are the most for
            warming up. Each model always has one warm-up and one round.
    Returns:
        name -> milliseconds of one forward.

    Example:
        >>> took_ms = measure_latency_ms({"small": nn.Conv2d(3, 4, kernel_size=1)}, image_size=8)
        >>> took_ms["small"] > 0
        True
    """
    image_BCHW = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    was_training = {module: module.training for model in models.values() for module in model.modules()}
    num_threads, started = torch.get_num_threads(), time.perf_counter()
    took_s: dict[str, list[float]] = {name: [] for name in models}
    torch.set_num_threads(1)
    try:
        for _ in range(WARM_UPS):
            for model in models.values():
                _time_forwards(model.eval(), image_BCHW, 1)
            if time.perf_counter() > started + budget_s / 2:
                break
        for _ in range(ROUNDS):
            for name, model in models.items():
                took_s[name] += _time_forwards(model, image_BCHW, FORWARDS)
            if time.perf_counter() > started + budget_s:
                break
    finally:
        torch.set_num_threads(num_threads)
        for module, training in was_training.items():
            module.training = training
    return {name: 1e3 * median(seconds) for name, seconds in took_s.items()}


@torch.inference_mode()
def _time_forwards(model: nn.Module, image_BCHW: Tensor, num_forwards: int) -> list[float]:
    """Seconds of each forward."""
    seconds = []
    for _ in range(num_forwards):
        started = time.perf_counter()
        model(image_BCHW)
        seconds.append(time.perf_counter() - started)
    return seconds


def latency_conditions() -> dict[str, Any]:
    """Says under which conditions `measure_latency_ms` measures here: batch, threads, processor, torch.

    Example:
        >>> sorted(latency_conditions())
        ['batch_size', 'cpu', 'num_threads', 'torch']
    """
    return {"batch_size": 1, "num_threads": 1, "cpu": _cpu_name(), "torch": torch.__version__}


def _cpu_name() -> str:
    """The processor as Linux names it, else as Python does, else its architecture."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named[0] if named else platform.processor()) or platform.machine()
