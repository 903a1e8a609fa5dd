"""Answers whether an epoch's plan gives each rank its equal share, every row its turn or its copies, and repeats."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.data.plan import EpochPlan, Piece, eval_plan, shuffle_window, train_plan

CHUNKS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda rows: sum(rows) > 0)
QUICK = settings(max_examples=40, deadline=None)


def rows_in(pieces: tuple[Piece, ...], chunk_rows: list[int]) -> list[int]:
    """Global row numbers in reading order."""
    before = [sum(chunk_rows[:chunk]) for chunk in range(len(chunk_rows))]
    return [before[piece.chunk] + row for piece in pieces for row in range(piece.start, piece.stop)]


def rows_of(plan: EpochPlan, chunk_rows: list[int]) -> list[int]:
    """As `rows_in`, of a plan that takes each row once."""
    assert plan.repeats == (None,) * len(plan.pieces)
    assert plan.num_rows == sum(piece.num_rows for piece in plan.pieces)
    return rows_in(plan.pieces, chunk_rows)


def taken(plan: EpochPlan, chunk_rows: list[int]) -> list[tuple[int, int]]:
    """(global row, number of the copy) in reading order."""
    found: list[tuple[int, int]] = []
    for piece, repeats in zip(plan.pieces, plan.repeats, strict=True):
        rows = rows_in((piece,), chunk_rows)
        if repeats is None:
            found += [(row, 0) for row in rows]
        else:
            found += [(rows[row], copy) for row, copy in zip(repeats.rows, repeats.copies, strict=True)]
    return found


def plans_of(chunk_rows: list[int], seed: int, epoch: int, world: int, **more: Any) -> list[EpochPlan]:
    return [
        train_plan(chunk_rows, seed=seed, epoch=epoch, rank=rank, world=world, **more)
        for rank in range(world)
    ]


def content(plans: list[EpochPlan], chunk_rows: list[int]) -> list[Any]:
    return [(p.pieces, taken(p, chunk_rows), p.left_out, p.times.tolist(), p.num_rows) for p in plans]


@given(chunk_rows=CHUNKS, seed=st.integers(0, 99), epoch=st.integers(0, 50), world=st.integers(1, 6))
@QUICK
def test_ranks_share_the_epoch_evenly_and_leave_out_only_what_is_named(
    chunk_rows: list[int], seed: int, epoch: int, world: int
) -> None:
    plans = plans_of(chunk_rows, seed, epoch, world)
    read = [row for plan in plans for row in rows_of(plan, chunk_rows)]
    assert sorted([*read, *plans[0].left_out]) == list(range(sum(chunk_rows)))
    assert {plan.num_rows for plan in plans} == {sum(chunk_rows) // world}
    assert {plan.left_out for plan in plans} == {plans[0].left_out}
    assert len(plans[0].left_out) == sum(chunk_rows) % world


@given(chunk_rows=CHUNKS, world=st.integers(2, 6))
@QUICK
def test_no_row_is_left_out_again_before_every_row_had_its_turn(chunk_rows: list[int], world: int) -> None:
    num_rows = sum(chunk_rows)
    times: Counter[int] = Counter()
    for epoch in range(2 * num_rows):
        times.update(train_plan(chunk_rows, seed=0, epoch=epoch, rank=0, world=world).left_out)
        counts = [times[row] for row in range(num_rows)]
        assert max(counts) - min(counts) <= 1
    assert sum(times.values()) == 2 * num_rows * (num_rows % world)


@given(chunk_rows=CHUNKS, seed=st.integers(0, 99), epoch=st.integers(0, 50), world=st.integers(1, 3))
@QUICK
def test_same_seed_and_epoch_give_the_same_plan(
    chunk_rows: list[int], seed: int, epoch: int, world: int
) -> None:
    first, again = (content(plans_of(chunk_rows, seed, epoch, world), chunk_rows) for _ in range(2))
    assert first == again


def test_other_epoch_and_other_seed_give_another_order() -> None:
    chunk_rows = [4] * 50
    orders = {
        tuple(rows_of(plans_of(chunk_rows, seed, epoch, 1)[0], chunk_rows))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(orders) == 4


def test_number_of_workers_does_not_change_the_order_of_the_chunks() -> None:
    chunk_rows = [5, 3, 8, 4]
    alone = rows_of(plans_of(chunk_rows, 3, 2, 1)[0], chunk_rows)
    shared = [row for plan in plans_of(chunk_rows, 3, 2, 4) for row in rows_of(plan, chunk_rows)]
    assert shared == alone


def test_chunk_is_not_read_in_more_pieces_than_needed() -> None:
    pieces = train_plan([10, 10], seed=0, epoch=0, rank=0, world=1).pieces
    assert sorted((piece.chunk, piece.start, piece.stop) for piece in pieces) == [(0, 0, 10), (1, 0, 10)]


@given(chunk_rows=CHUNKS, world=st.integers(1, 6))
@QUICK
def test_evaluation_reads_each_row_once_in_file_order(chunk_rows: list[int], world: int) -> None:
    parts = [rows_in(eval_plan(chunk_rows, rank=rank, world=world), chunk_rows) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(sum(chunk_rows)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(num_rows=st.integers(0, 200), seed=st.integers(0, 9), epoch=st.integers(0, 9))
@QUICK
def test_window_order_is_a_permutation_named_by_its_coordinates(num_rows: int, seed: int, epoch: int) -> None:
    order = shuffle_window(num_rows, seed=seed, epoch=epoch, rank=1, window=2)
    assert sorted(order.tolist()) == list(range(num_rows))
    np.testing.assert_array_equal(order, shuffle_window(num_rows, seed=seed, epoch=epoch, rank=1, window=2))


def test_each_window_rank_and_epoch_is_shuffled_differently() -> None:
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = {tuple(shuffle_window(64, seed=0, epoch=e, rank=r, window=w).tolist()) for e, r, w in names}
    assert len(orders) == len(names)


# plans without a sampler: pieces and rows left out as they were before there were samplers


@pytest.mark.parametrize(
    ("chunk_rows", "digest"),
    [
        ([32] * 6, "cfb3135d1d1dd615"),
        ([5, 31, 1, 17, 64, 9, 0, 40], "feb65d1c3a6d6ab0"),
        ([50], "f0fe8ea1b67abdf6"),
    ],
)
@pytest.mark.parametrize("given_copies", [False, True])
def test_plans_without_a_sampler_stay_what_they_were(
    chunk_rows: list[int], digest: str, given_copies: bool
) -> None:
    copies = np.ones(sum(chunk_rows), np.int64) if given_copies else None
    lines = []
    for world in (1, 2, 3, 5):
        for epoch in (0, 1, 7):
            for plan in plans_of(chunk_rows, 11, epoch, world, copies=copies):
                rows_of(plan, chunk_rows)
                lines.append(repr(([(p.chunk, p.start, p.stop) for p in plan.pieces], plan.left_out)))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


# plans with copies

WORLDS = st.integers(1, 6)


@st.composite
def sampled(draw: st.DrawFn) -> tuple[list[int], np.ndarray]:
    """Chunks, and how often an epoch holds each of their rows; never nothing at all."""
    chunk_rows = draw(CHUNKS)
    copies = draw(st.lists(st.integers(0, 5), min_size=sum(chunk_rows), max_size=sum(chunk_rows)))
    copies[draw(st.integers(0, len(copies) - 1))] += 6
    return chunk_rows, np.array(copies)


@given(case=sampled(), seed=st.integers(0, 99), epoch=st.integers(0, 50), world=WORLDS)
@QUICK
def test_ranks_share_the_copies_evenly_and_leave_out_only_what_is_named(
    case: tuple[list[int], np.ndarray], seed: int, epoch: int, world: int
) -> None:
    chunk_rows, copies = case
    plans = plans_of(chunk_rows, seed, epoch, world, copies=copies)
    found = [pair for plan in plans for pair in taken(plan, chunk_rows)]
    assert {plan.num_rows for plan in plans} == {len(taken(plan, chunk_rows)) for plan in plans}
    assert {plan.num_rows for plan in plans} == {copies.sum() // world}
    assert {plan.left_out for plan in plans} == {plans[0].left_out}
    assert len(plans[0].left_out) == copies.sum() % world
    times = copies - np.bincount(plans[0].left_out, minlength=len(copies)).astype(np.int64)
    assert all((plan.times == times).all() for plan in plans)
    wanted = [(row, copy) for row, number in enumerate(times.tolist()) for copy in range(number)]
    assert sorted(found) == wanted, "copies of a row are numbered from 0 over all ranks"


@given(case=sampled(), seed=st.integers(0, 99), epoch=st.integers(0, 50), world=WORLDS)
@QUICK
def test_number_of_workers_does_not_change_the_order_of_the_copies(
    case: tuple[list[int], np.ndarray], seed: int, epoch: int, world: int
) -> None:
    chunk_rows, copies = case
    (alone,) = plans_of(chunk_rows, seed, epoch, 1, copies=copies)
    plans = plans_of(chunk_rows, seed, epoch, world, copies=copies)
    shared = [pair for plan in plans for pair in taken(plan, chunk_rows)]
    times = plans[0].times
    assert shared == [(row, copy) for row, copy in taken(alone, chunk_rows) if copy < times[row]]


@given(case=sampled(), epoch=st.integers(0, 9), world=WORLDS)
@QUICK
def test_a_chunk_is_read_once_per_rank_and_not_beyond_the_rows_that_are_taken(
    case: tuple[list[int], np.ndarray], epoch: int, world: int
) -> None:
    chunk_rows, copies = case
    for plan in plans_of(chunk_rows, 0, epoch, world, copies=copies):
        reads = Counter(piece.chunk for piece in plan.pieces)
        gone = [row for row in plan.left_out if plan.times[row] == 0]
        assert sum(reads.values()) - len(reads) <= len(gone), "a piece more for each row left out at most"
        used = {row for row, _ in taken(plan, chunk_rows)}
        for piece in plan.pieces:
            rows = rows_in((piece,), chunk_rows)
            assert {rows[0], rows[-1]} <= used


def test_row_may_be_shared_by_two_ranks() -> None:
    plans = plans_of([1, 1], 0, 0, 2, copies=np.array([5, 1]))
    assert [sorted(taken(plan, [1, 1])) for plan in plans] in (
        [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (1, 0)]],
        [[(0, 0), (0, 1), (1, 0)], [(0, 2), (0, 3), (0, 4)]],
    )


def test_what_is_left_out_of_copies_moves_on_from_epoch_to_epoch() -> None:
    copies = np.array([2, 0, 3])
    left_out = [plans_of([3], 0, epoch, 2, copies=copies)[0].left_out for epoch in range(5)]
    assert left_out == [(0,), (0,), (2,), (2,), (2,)]
