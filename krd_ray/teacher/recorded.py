"""Answers how a forward of fixed shape runs with little work for the CPU: compiled, recorded as a CUDA graph.

Does not make views and does not pad; it is given batches of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from krd_ray.errors import TeacherError

Compile = Literal["off", "cuda_graph", "inductor"]
FixedForward = Callable[[Tensor], tuple[Tensor, Tensor]]
WARM_UP_CALLS = 3  # before recording: libraries choose their algorithms and take their memory


@torch.inference_mode()
def record_forward(
    forward: FixedForward, shape: tuple[int, int, int, int], device: torch.device, how: Compile
) -> FixedForward:
    """Returns a function with the answers of `forward` for inputs of one shape.

    `inductor` lets torch.compile fuse the network's operations. On a GPU it and `cuda_graph` then record the
    forward once, as a CUDA graph, and replay it: one launch instead of one per operation.

    Args:
        forward: (view [b, 3, S, S]) -> (logits [b, C], features [b, D]); called in inference mode.
        shape: (b, 3, S, S), the only one that will come, float32 with channels last in memory.
        device: where they will lie.
        how: `off` returns `forward` itself.
    Raises:
        TeacherError: the network cannot be compiled or recorded.
    """
    if how == "off":
        return forward
    example = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    try:
        if how == "inductor":
            forward = torch.compile(forward, dynamic=False, options={"freezing": True})
            forward(example)
        return _Graph(forward, example) if device.type == "cuda" else forward
    except Exception as error:  # a network of the user's may do anything that neither can follow
        raise TeacherError(
            f"teacher.compile is {how}, but the teacher's forward does not allow it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); set teacher.compile to off"
        ) from error


class _Graph:
    """A recorded forward; its answers are copies, which later calls leave alone."""

    def __init__(self, forward: FixedForward, example: Tensor) -> None:
        self._input = example.clone()
        aside = torch.cuda.Stream(example.device)
        aside.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                forward(self._input)
        torch.cuda.current_stream(example.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of a student's process may use the card while a teacher inside it records.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = forward(self._input)

    def __call__(self, view_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        self._input.copy_(view_BCHW)
        self._graph.replay()
        logits, features = self._outputs
        return logits.clone(), features.clone()
