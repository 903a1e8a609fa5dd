"""Answers what a worker reads of the training split in an epoch, and whether all ranks together have read all of it.

Does not train and does not shuffle (`data.plan` and `data.stream` do).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from krd_ray.config import SamplerConfig
from krd_ray.data.plan import EpochPlan, IntArray, train_plan
from krd_ray.data.shard_set import Batch, ShardSet, labels_of, sample_ids_of
from krd_ray.data.stream import train_batches
from krd_ray.maths.samplers import INSTANCE_BALANCED, SAMPLERS, copies_in_epoch
from krd_ray.train.reduce import coverage

ROWS_PER_RUN = 1 << 18  # of Ray Data, so that the plans of its epochs take a few MB at most


@dataclass(frozen=True)
class RowSettings:
    """What decides the rows of an epoch besides the split itself.

    Args:
        sampler: name and first epoch.
        class_counts: n_c of the split.
        seed: shuffle seed.
        batch_size: of this rank.
        window_rows: of the shuffle.
        cycle: number of different views per image; None: no bound.
        rank, world: this worker and how many there are.
    """

    sampler: SamplerConfig
    class_counts: tuple[int, ...]
    seed: int
    batch_size: int
    window_rows: int
    cycle: int | None
    rank: int
    world: int


class EpochRows:
    """One rank's share of the split, epoch by epoch; ids and, for a sampler, labels are read once, images never."""

    def __init__(self, shards: ShardSet, settings: RowSettings) -> None:
        self._shards, self._settings = shards, settings
        self._ids = sample_ids_of(shards)
        self._by_id = np.argsort(self._ids)
        samples = settings.sampler.name != INSTANCE_BALANCED
        self._labels = labels_of(shards) if samples else None
        streamed = shards.blocks is None
        self._epochs_per_run = max(1, ROWS_PER_RUN // max(1, shards.num_rows)) if streamed else 1
        # What is read ahead is asked for again when its epoch begins, perhaps in the next run.
        self._plan_once = functools.lru_cache(maxsize=self._epochs_per_run + 2)(self._make_plan)

    def plan(self, epoch: int) -> EpochPlan:
        """Returns which rows this rank trains in an epoch, and how often."""
        return self._plan_once(epoch)

    def _make_plan(self, epoch: int) -> EpochPlan:
        at = self._settings
        return train_plan(
            self._shards.chunk_rows,
            seed=at.seed,
            epoch=epoch,
            rank=at.rank,
            world=at.world,
            copies=self._copies(epoch),
        )

    def num_batches(self, plan: EpochPlan) -> int:
        """Returns how many batches the plan's rows make; the last one may be smaller."""
        return -(-plan.num_rows // self._settings.batch_size)

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """Yields the rows of epochs first, ..., end - 1 in shuffled batches, each row with its view index.

        Where Ray Data reads them, several short epochs are one run of it: starting takes some 0.15 s.
        """
        at = self._settings
        for start in range(first, end, self._epochs_per_run):
            stop = min(start + self._epochs_per_run, end)
            yield from train_batches(
                self._shards,
                [self.plan(epoch) for epoch in range(start, stop)],
                batch_size=at.batch_size,
                seed=at.seed,
                first_epoch=start,
                rank=at.rank,
                window_rows=at.window_rows,
                cycle=at.cycle,
            )

    def coverage(self, plan: EpochPlan, seen: Sequence[IntArray], device: torch.device) -> dict[str, Any]:
        """Returns what all ranks have trained, against the plan; `seen` are the ids of this rank's batches."""
        left_out = self._ids[list(plan.left_out)].tolist()
        return coverage(self._ids[self._by_id], plan.times[self._by_id], seen, left_out, device)

    def _copies(self, epoch: int) -> IntArray | None:
        at = self._settings
        if self._labels is None or epoch < at.sampler.from_epoch:
            return None
        power = SAMPLERS[at.sampler.name].power
        return copies_in_epoch(
            self._ids, self._labels, at.class_counts, power=power, seed=at.seed, epoch=epoch
        )
