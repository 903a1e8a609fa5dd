"""Answers which rows a worker reads in an epoch, and in what order.

Does not read anything: a plan is a pure function of (rows per chunk, seed, epoch, rank, world size), so
every student with the same seed asks for the same samples at about the same time and a retry repeats itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one chunk; a chunk is one Parquet row group, counted over all shards."""

    chunk: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class EpochPlan:
    """One rank's share of an epoch and what the even split leaves out for all ranks together."""

    pieces: tuple[Piece, ...]
    left_out: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)


def train_plan(chunk_rows: Sequence[int], *, seed: int, epoch: int, rank: int, world: int) -> EpochPlan:
    """Shuffles the chunks and gives each rank equally many rows.

    `N mod world` rows are left out, rows (epoch * remainder + i) mod N in file order: every row takes its
    turn before any is left out again.

    Args:
        chunk_rows: rows of each chunk, in file order.
        seed: shuffle seed; the same for students that are to share targets.
        epoch: from 0.
        rank: in [0, world).
        world: number of workers of the student.
    Returns:
        Pieces in reading order, and the global row numbers that no rank reads in this epoch.

    Example:
        >>> [train_plan([3, 2], seed=0, epoch=e, rank=0, world=2).left_out for e in range(3)]
        [(0,), (1,), (2,)]
    """
    num_rows = int(sum(chunk_rows))
    remainder = num_rows % world
    left_out = tuple(sorted((epoch * remainder + i) % num_rows for i in range(remainder)))
    order = np.random.default_rng((seed, epoch)).permutation(len(chunk_rows))
    whole = list(_without(chunk_rows, order, left_out))
    share = num_rows // world
    return EpochPlan(tuple(_cut(whole, rank * share, (rank + 1) * share)), left_out)


def eval_plan(chunk_rows: Sequence[int], *, rank: int, world: int) -> EpochPlan:
    """Gives each rank a contiguous part in file order; every row once, parts differ by one row at most."""
    num_rows = int(sum(chunk_rows))
    whole = [Piece(chunk, 0, rows) for chunk, rows in enumerate(chunk_rows)]
    return EpochPlan(tuple(_cut(whole, rank * num_rows // world, (rank + 1) * num_rows // world)), ())


def shuffle_window(num_rows: int, *, seed: int, epoch: int, rank: int, window: int) -> IntArray:
    """Returns the order of the rows of one shuffle window, int64 [num_rows]."""
    return np.random.default_rng((seed, epoch, rank, window)).permutation(num_rows)


def _without(chunk_rows: Sequence[int], order: IntArray, left_out: tuple[int, ...]) -> Iterator[Piece]:
    """Chunks in `order` as pieces around the global rows in `left_out`."""
    first_row = np.concatenate([[0], np.cumsum(chunk_rows)])
    for chunk in order.tolist():
        begin, end = int(first_row[chunk]), int(first_row[chunk + 1])
        cuts = [row - begin for row in left_out if begin <= row < end]
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, end - begin]
        yield from (Piece(chunk, a, b) for a, b in zip(starts, stops, strict=True) if b > a)


def _cut(pieces: Sequence[Piece], begin: int, end: int) -> Iterator[Piece]:
    """The rows [begin, end) of the concatenated pieces."""
    offset = 0
    for piece in pieces:
        low, high = max(begin - offset, 0), min(end - offset, piece.num_rows)
        if low < high:
            yield Piece(piece.chunk, piece.start + low, piece.start + high)
        offset += piece.num_rows
