"""Answers whether an epoch's plan gives each rank its equal share, every row its turn, and repeats itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.data.plan import EpochPlan, eval_plan, shuffle_window, train_plan

CHUNKS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda rows: sum(rows) > 0)
QUICK = settings(max_examples=40, deadline=None)


def rows_of(plan: EpochPlan, chunk_rows: list[int]) -> list[int]:
    """Global row numbers in reading order."""
    before = [sum(chunk_rows[:chunk]) for chunk in range(len(chunk_rows))]
    return [before[piece.chunk] + row for piece in plan.pieces for row in range(piece.start, piece.stop)]


def plans_of(chunk_rows: list[int], seed: int, epoch: int, world: int) -> list[EpochPlan]:
    return [train_plan(chunk_rows, seed=seed, epoch=epoch, rank=rank, world=world) for rank in range(world)]


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
    assert plans_of(chunk_rows, seed, epoch, world) == plans_of(chunk_rows, seed, epoch, world)


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
    plans = [eval_plan(chunk_rows, rank=rank, world=world) for rank in range(world)]
    assert [row for plan in plans for row in rows_of(plan, chunk_rows)] == list(range(sum(chunk_rows)))
    sizes = [plan.num_rows for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    assert all(plan.left_out == () for plan in plans)


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
