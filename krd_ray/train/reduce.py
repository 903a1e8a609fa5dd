"""Answers what all ranks of a student know together: sums, finiteness, which samples an epoch has seen.

Does not print or write. Without a process group (one worker) everything is local.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from krd_ray.data.plan import IntArray


def sum_over_ranks(vector: Tensor, device: torch.device) -> Tensor:
    """Returns the elementwise sum over ranks, on the CPU."""
    if not _several():
        return vector
    total = vector.to(device)
    dist.all_reduce(total)
    return total.cpu()


def all_finite(values: Iterable[float], device: torch.device) -> bool:
    """Returns True on every rank when all values of all ranks are finite, else False on every rank."""
    finite = all(math.isfinite(value) for value in values)
    if not _several():
        return finite
    return bool(sum_over_ranks(torch.tensor([0.0 if finite else 1.0]), device).item() == 0)


def any_rank(own: bool, device: torch.device) -> bool:
    """Returns True on every rank when it is True on any, else False on every rank."""
    if not _several():
        return own
    return bool(sum_over_ranks(torch.tensor([float(own)]), device).item() > 0)


def share_buffers(module: nn.Module) -> None:
    """Gives every rank the buffers of rank 0 (running statistics), so that all ranks evaluate one model."""
    if _several():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def coverage(
    sample_ids: IntArray,
    expected: IntArray,
    seen: Sequence[IntArray],
    left_out: Iterable[int],
    device: torch.device,
) -> dict[str, Any]:
    """Counts how often each sample of the split was trained on in an epoch, over all ranks, against the plan.

    Args:
        sample_ids: int64 [N], sorted, the whole split.
        expected: int64 [N], how often the plan takes each of them, all ranks together.
        seen: ids of this rank's batches.
        left_out: ids that the even split gives to no rank in this epoch, one entry per copy.
        device: for the reduction.
    Returns:
        `seen`: samples trained on; `missed`: times that a sample was expected but not seen; `doubled`: times that
        it was seen but not expected; `left_out`: number of rows; `left_out_ids`.
    """
    ids = np.concatenate(seen) if seen else np.empty(0, np.int64)
    own = np.bincount(np.searchsorted(sample_ids, ids), minlength=len(sample_ids))
    times = sum_over_ranks(torch.from_numpy(own), device).numpy()
    skipped = sorted(left_out)
    return {
        "seen": int((times > 0).sum()),
        "missed": int(np.maximum(expected - times, 0).sum()),
        "doubled": int(np.maximum(times - expected, 0).sum()),
        "left_out": len(skipped),
        "left_out_ids": skipped,
    }


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
