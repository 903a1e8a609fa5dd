"""Answers which rows a worker reads in an epoch, how often, and in what order.

Does not read anything: a plan is a pure function of (rows per chunk, copies per row, seed, epoch, rank, world size),
so every student with the same seed asks for the same samples at about the same time and a retry repeats itself.
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


@dataclass(frozen=True, eq=False)
class Repeats:
    """What is taken of a piece that is not simply taken whole: row in the piece and number of the copy, int64 [n]."""

    rows: IntArray
    copies: IntArray


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One rank's share of an epoch.

    Args:
        pieces: what to read, in this order, each once.
        repeats: of each piece, what to take of it; None: each row once.
        left_out: global row numbers that the even split gives to no rank, one entry per copy.
        times: int64 [N], how often all ranks together take each row, in file order.
        num_rows: rows that this rank trains, copies included; the same on every rank.
    """

    pieces: tuple[Piece, ...]
    repeats: tuple[Repeats | None, ...]
    left_out: tuple[int, ...]
    times: IntArray
    num_rows: int


def train_plan(
    chunk_rows: Sequence[int],
    *,
    seed: int,
    epoch: int,
    rank: int,
    world: int,
    copies: IntArray | None = None,
) -> EpochPlan:
    """Shuffles the chunks and gives each rank equally many rows; copies of a row stand side by side in its chunk.

    Of N' rows, copies included, `N' mod world` are left out, those at (epoch * remainder + i) mod N' in file order:
    without a sampler every row takes its turn before any is left out again. What is left out of a row's copies is the
    last one.

    Args:
        chunk_rows: rows of each chunk, in file order.
        seed: shuffle seed; the same for students that are to share targets.
        epoch: from 0.
        rank: in [0, world).
        world: number of workers of the student.
        copies: int64 [N], how often the epoch holds each row; None: once.
    Returns:
        This rank's share.

    Example:
        >>> [train_plan([3, 2], seed=0, epoch=e, rank=0, world=2).left_out for e in range(3)]
        [(0,), (1,), (2,)]
        >>> train_plan([2], seed=0, epoch=0, rank=0, world=1, copies=np.array([0, 3])).pieces
        (Piece(chunk=0, start=1, stop=2),)
    """
    times = np.ones(sum(chunk_rows), np.int64) if copies is None else np.array(copies, np.int64)
    left_out = _leave_out(times, epoch, world)
    order = np.random.default_rng((seed, epoch)).permutation(len(chunk_rows))
    gone = [row for row in left_out if times[row] == 0]
    whole = _without(chunk_rows, order, gone)
    share = int(times.sum()) // world
    cut = list(_cut(whole, chunk_rows, times, rank * share, (rank + 1) * share))
    pieces, repeats = tuple(piece for piece, _ in cut), tuple(taken for _, taken in cut)
    return EpochPlan(pieces, repeats, left_out, times, share)


def eval_plan(chunk_rows: Sequence[int], *, rank: int, world: int) -> tuple[Piece, ...]:
    """Gives each rank a contiguous part in file order; every row once, parts differ by one row at most."""
    num_rows = int(sum(chunk_rows))
    whole = [Piece(chunk, 0, rows) for chunk, rows in enumerate(chunk_rows)]
    once = np.ones(num_rows, np.int64)
    cut = _cut(whole, chunk_rows, once, rank * num_rows // world, (rank + 1) * num_rows // world)
    return tuple(piece for piece, _ in cut)


def shuffle_window(num_rows: int, *, seed: int, epoch: int, rank: int, window: int) -> IntArray:
    """Returns the order of the rows of one shuffle window, int64 [num_rows]."""
    return np.random.default_rng((seed, epoch, rank, window)).permutation(num_rows)


def _leave_out(times: IntArray, epoch: int, world: int) -> tuple[int, ...]:
    """Takes the epoch's remainder out of `times` and returns the rows it fell on."""
    ends = np.cumsum(times)
    total = int(ends[-1]) if len(ends) else 0
    remainder = total % world
    places = sorted((epoch * remainder + i) % total for i in range(remainder))
    rows = np.searchsorted(ends, places, side="right")
    np.subtract.at(times, rows, 1)
    return tuple(rows.tolist())


def _without(chunk_rows: Sequence[int], order: IntArray, gone: Sequence[int]) -> Iterator[Piece]:
    """Chunks in `order` as pieces around the global rows in `gone`."""
    first_row = np.concatenate([[0], np.cumsum(chunk_rows)])
    for chunk in order.tolist():
        begin, end = int(first_row[chunk]), int(first_row[chunk + 1])
        cuts = [row - begin for row in gone if begin <= row < end]
        starts, stops = [0, *(cut + 1 for cut in cuts)], [*cuts, end - begin]
        yield from (Piece(chunk, a, b) for a, b in zip(starts, stops, strict=True) if b > a)


def _cut(
    pieces: Iterator[Piece] | Sequence[Piece],
    chunk_rows: Sequence[int],
    times: IntArray,
    begin: int,
    end: int,
) -> Iterator[tuple[Piece, Repeats | None]]:
    """What lies in [begin, end) of the pieces one after another, each row standing there `times` times."""
    first_row = np.concatenate([[0], np.cumsum(chunk_rows)])
    before = np.concatenate([[0], np.cumsum(times)])  # copies of all rows before a row, in file order
    offset = 0
    for piece in pieces:
        base = int(first_row[piece.chunk])
        part = before[base + piece.start : base + piece.stop + 1]
        low, high = max(begin - offset, 0), min(end - offset, int(part[-1] - part[0]))
        if low < high:
            start, stop, taken = _take(part - part[0], low, high)
            yield Piece(piece.chunk, piece.start + start, piece.start + stop), taken
        offset += int(part[-1] - part[0])


def _take(before: IntArray, low: int, high: int) -> tuple[int, int, Repeats | None]:
    """The copies [low, high) of some rows: first row, row behind the last, and what to take in between.

    `before` [rows + 1] counts the copies in front of each row.
    """
    start = int(np.searchsorted(before, low, side="right")) - 1
    stop = int(np.searchsorted(before, high, side="left"))
    within = np.clip(before[start : stop + 1], low, high)
    counts: IntArray = within[1:] - within[:-1]
    if low == before[start] and (counts == 1).all():
        return start, stop, None
    rows = np.repeat(np.arange(stop - start), counts)
    return start, stop, Repeats(rows, np.arange(low, high) - before[start:stop][rows])
