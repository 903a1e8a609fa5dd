"""Answers in which order rows become batches: shuffled inside windows for training, in file order for evaluation.

Does not read (`reading` does) and knows neither teacher nor student. With cached blocks or read afresh, the batches
are the same to the bit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from krd_ray.data.plan import EpochPlan, IntArray, Repeats, eval_plan, shuffle_window
from krd_ray.data.reading import blocks_of
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.maths.samplers import view_of_copy


def train_batches(
    shards: ShardSet,
    plans: Sequence[EpochPlan],
    *,
    batch_size: int,
    seed: int,
    first_epoch: int,
    rank: int,
    window_rows: int,
    cycle: int | None = None,
) -> Iterator[Batch]:
    """Yields the rows of consecutive epochs in shuffled batches, read in one go.

    Chunks come in plan order, rows are shuffled inside a window, and no batch holds rows of two epochs. A row that a
    plan repeats is read once and stands in memory once; its copy k takes view epoch + k.

    Args:
        shards: the split.
        plans: this rank's shares, from `train_plan`, of epochs first_epoch, first_epoch + 1, ...
        batch_size: rows of a batch; the last one of an epoch may be smaller.
        seed, first_epoch, rank: name the shuffle.
        window_rows: rows shuffled together; at least the rank's rows gives a full shuffle.
        cycle: number of different views per image; None: no bound.
    Returns:
        Batches that together hold each row of the plans exactly as often as they say.
    """
    blocks = blocks_of(shards, [piece for plan in plans for piece in plan.pieces])
    for epoch, plan in enumerate(plans, first_epoch):
        parts = (
            _taken(block, repeats, epoch, cycle)
            for block, repeats in zip(itertools.islice(blocks, len(plan.pieces)), plan.repeats, strict=True)
        )
        shuffle = functools.partial(shuffle_window, seed=seed, epoch=epoch, rank=rank)
        yield from _shuffled(parts, plan.num_rows, batch_size, window_rows, shuffle)


def eval_batches(shards: ShardSet, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yields this rank's part of the split in file order, each row once."""
    for block in blocks_of(shards, eval_plan(shards.chunk_rows, rank=rank, world=world)):
        yield from _cut_batches(_whole(block), np.arange(len(block)), batch_size)


@dataclass(frozen=True)
class _Rows:
    """Rows that wait to be shuffled: `index` [n] into the images at hand, each of which may be meant many times."""

    images: Batch
    index: IntArray
    view_index: IntArray

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, places: IntArray) -> Batch:
        """Copies out the rows at the places."""
        index, images = self.index[places], self.images
        return Batch(
            images.sample_ids[index],
            images.labels[index],
            images.images_BHWC[index],
            self.view_index[places],
        )


def _shuffled(
    parts: Iterator[_Rows],
    num_rows: int,
    batch_size: int,
    window_rows: int,
    shuffle: Callable[..., IntArray],
) -> Iterator[Batch]:
    """One epoch's batches; rows that do not fill a batch go on into the next window."""
    held: list[_Rows] = []
    held_rows, window, left = 0, 0, num_rows
    for part in parts:
        held.append(part)
        held_rows += len(part)
        left -= len(part)
        if held_rows >= window_rows or left == 0:
            rows = _join(held)
            order = shuffle(held_rows, window=window)
            keep = held_rows % batch_size if left else 0
            yield from _cut_batches(rows, order[: held_rows - keep], batch_size)
            held = [_whole(rows.batch(order[held_rows - keep :]))] if keep else []
            held_rows, window = keep, window + 1


def _whole(block: Batch) -> _Rows:
    return _Rows(block, np.arange(len(block)), block.view_index)


def _taken(block: Batch, repeats: Repeats | None, epoch: int, cycle: int | None) -> _Rows:
    """What an epoch takes of a piece; images that it does not take are let go."""
    if repeats is None:
        once = np.zeros(len(block), np.int64)
        return _Rows(block, np.arange(len(block)), view_of_copy(once, epoch=epoch, cycle=cycle))
    used, index = np.unique(repeats.rows, return_inverse=True)
    images = block if len(used) == len(block) else _whole(block).batch(used)
    return _Rows(images, index, view_of_copy(repeats.copies, epoch=epoch, cycle=cycle))


def _cut_batches(rows: _Rows, order: IntArray, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(order), batch_size):
        yield rows.batch(order[start : start + batch_size])


def _join(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    images = [part.images for part in parts]
    first = np.cumsum([0, *(len(each) for each in images[:-1])])
    return _Rows(
        Batch(
            np.concatenate([each.sample_ids for each in images]),
            np.concatenate([each.labels for each in images]),
            np.concatenate([each.images_BHWC for each in images]),
            np.concatenate([each.view_index for each in images]),
        ),
        np.concatenate([part.index + offset for part, offset in zip(parts, first.tolist(), strict=True)]),
        np.concatenate([part.view_index for part in parts]),
    )
