"""Answers how many copies of each sample an epoch holds: samplers by class that keep no state, so that they stream.

Does not order or read rows (`data.plan`, `data.reading` do). The number of a sample's copies is a pure function of
its id, its class and the epoch: every rank, every retry and every student with the same seed finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths.views import counter_uniform

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

INSTANCE_BALANCED = "instance_balanced"
DRAW_COPIES = 1 << 16  # far from the draws of views: their seed may be the same


@dataclass(frozen=True)
class SamplerRecord:
    """A sampler: class c gets n_c^power of the epoch, in proportion."""

    power: float
    source: str


def expected_copies(class_counts: Sequence[int] | IntArray, power: float) -> FloatArray:
    """Copies of one sample of each class that an epoch of N rows is expected to hold.

        q_c = n_c^p / sum_j n_j^p * N / n_c,   N = sum_j n_j

    So the epoch's expected length stays N, and class c has n_c^p / sum_j n_j^p of it.

    Args:
        class_counts: [C] n_c >= 0; classes without samples take no part.
        power: p in [0, 1]; 1 shows every sample once, 0 every class equally often.
    Returns:
        [C] float64, 0 for a class without samples; exactly 1 everywhere for p = 1.
    Raises:
        ConfigError: the power is out of range.
        DataError: a count is negative, or none is positive.
    Source: Kang et al. 2020 (arXiv:1910.09217), equation 1. Deviation: copies of a sample, not a class's probability.
    Example:
        >>> expected_copies([6, 2], 0.0).tolist()
        [0.6666666666666666, 2.0]
    """
    if not 0 <= power <= 1:
        raise ConfigError(f"a sampler's power must be in [0, 1], got {power}")
    counts = np.asarray(class_counts, np.float64)
    if (counts < 0).any() or not counts.sum() > 0:
        raise DataError(
            f"class counts must be >= 0 with one above 0 at least, got {counts.astype(int).tolist()}"
        )
    present = np.where(counts > 0, counts, 1.0)
    total = np.where(counts > 0, present**power, 0.0).sum()
    return np.where(counts > 0, present ** (power - 1) * counts.sum() / total, 0.0)


def copies_in_epoch(
    sample_ids: IntArray,
    labels: IntArray,
    class_counts: Sequence[int] | IntArray,
    *,
    power: float,
    seed: int,
    epoch: int,
) -> IntArray:
    """How often each sample stands in an epoch: the expected number of copies, rounded up or down by chance.

        copies_i = floor(q_y) + [u(seed, epoch, i) < q_y - floor(q_y)],   so that E[copies_i] = q_y

    Args:
        sample_ids: [N] int64, unique and stable.
        labels: [N] integers in [0, C).
        class_counts: [C] n_c of these samples.
        power: as in `expected_copies`.
        seed: shuffle seed.
        epoch: from 0.
    Returns:
        [N] int64 >= 0; a sample's number depends on no other sample but through the class counts.
    Raises:
        ShapeError: ids and labels differ in shape.
        ConfigError, DataError: as `expected_copies`; a label is out of range.
    Source: stochastic rounding; u is `maths.views.counter_uniform`.
    Example:
        >>> copies_in_epoch(np.arange(3), np.array([0, 0, 1]), [2, 1], power=1.0, seed=0, epoch=0).tolist()
        [1, 1, 1]
    """
    ids, classes = np.asarray(sample_ids, np.int64), np.asarray(labels, np.int64)
    if ids.shape != classes.shape or ids.ndim != 1:
        raise ShapeError(f"sample_ids and labels must be [N] both, got {ids.shape} and {classes.shape}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < len(class_counts):
        raise DataError(
            f"labels reach from {classes.min()} to {classes.max()}, the class counts are of {len(class_counts)} "
            "classes; shards and dataset.json do not belong together"
        )
    q = expected_copies(class_counts, power)[classes]
    whole = np.floor(q)
    names = torch.from_numpy(np.ascontiguousarray(ids))
    u = counter_uniform(seed, names, torch.full_like(names, epoch), DRAW_COPIES).numpy()
    return (whole + (u < q - whole)).astype(np.int64)


def view_of_copy(copy: IntArray, *, epoch: int, cycle: int | None) -> IntArray:
    """Which view each copy of a sample takes: the one that copy 0 takes `copy` epochs later.

        view = epoch + copy   (mod cycle)

    Repeats show other pixels, and ask the teacher for nothing that a later epoch does not ask for as well.

    Args:
        copy: [B] int64 >= 0.
        epoch: from 0.
        cycle: number of different views per image; None: no bound.
    Returns:
        [B] int64.
    Example:
        >>> view_of_copy(np.array([0, 1, 2]), epoch=4, cycle=5).tolist()
        [4, 0, 1]
    """
    view = np.asarray(copy, np.int64) + epoch
    return view if cycle is None else view % cycle


# Deferred re-sampling (Cao et al. 2019, arXiv:1906.07413) is any of these from a later epoch on.
SAMPLERS: dict[str, SamplerRecord] = {
    INSTANCE_BALANCED: SamplerRecord(1.0, "every sample once; arXiv:1910.09217, q = 1"),
    "square_root": SamplerRecord(0.5, "Mahajan et al. 2018, arXiv:1805.00932; arXiv:1910.09217, q = 1/2"),
    "class_balanced": SamplerRecord(0.0, "every class equally often; arXiv:1910.09217, q = 0"),
}
