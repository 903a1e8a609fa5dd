"""Answers whether the engine forwards each view of a sample once, whoever asks and however requests mix views.

Does not use Ray or a model: the forward is arithmetic, so every value can be checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from krd_ray.teacher.engine import EngineStats
from tests.unit.engine_parts import (
    IDS,
    NUM_SAMPLES,
    PATIENCE_S,
    WIDTH,
    Asker,
    Build,
    FakeForward,
    engines,
    expected_of,
    pixels_of,
    serve,
    until,
)


@pytest.fixture
def forward() -> FakeForward:
    return FakeForward()


@pytest.fixture
def build(tmp_path: Path, forward: FakeForward) -> Iterator[Build]:
    yield from engines(tmp_path, forward)


def test_each_view_of_a_sample_is_forwarded_once_however_many_ask(build: Build, forward: FakeForward) -> None:
    engine = build()

    def batches(rng: np.random.Generator) -> list[np.ndarray]:
        return [IDS[part] for part in np.split(rng.permutation(NUM_SAMPLES), 8)]

    askers = [
        (view, ids, Asker(engine, view, ids))
        for student in range(4)
        for view in range(3)
        for ids in batches(np.random.default_rng(student))
    ]
    for view, ids, asker in askers:
        assert asker.result().tobytes() == expected_of(view, ids).tobytes()
    assert len(forward.seen) == 3 * NUM_SAMPLES
    assert set(forward.seen.values()) == {1}
    stats = engine.stats()
    assert (stats.requests, stats.rows) == (4 * 3 * 8, 4 * 3 * NUM_SAMPLES)
    assert stats.forwards == stats.unique_views == 3 * NUM_SAMPLES
    assert stats.hits + stats.joined + stats.forwards == stats.rows
    assert stats.forward_calls == len(forward.call_rows)
    assert stats.padded_rows == sum(-rows % 16 for rows in forward.call_rows)


def test_requests_that_wait_fill_micro_batches_across_their_borders(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:4])
    assert forward.entered.wait(PATIENCE_S)
    others = [Asker(engine, 0, IDS[start : start + 10]) for start in range(10, 60, 10)]
    until(lambda: engine._queued_rows == 54)
    until(lambda: len(engine._queue) == 5)
    forward.gate.set()
    for asker, start in zip([first, *others], [0, *range(10, 60, 10)], strict=True):
        ids = IDS[:4] if start == 0 else IDS[start : start + 10]
        np.testing.assert_array_equal(asker.result(), expected_of(0, ids))
    assert forward.call_rows == [4, 16, 16, 16, 2]
    assert engine.stats().forward_calls == 5
    assert engine.stats().padded_rows == 12 + 14


def test_answer_goes_out_with_its_own_last_row_whatever_waits_behind_it(
    build: Build, forward: FakeForward
) -> None:
    engine = build(micro_batch=4)
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:10])  # three forwards
    assert forward.entered.wait(PATIENCE_S)
    behind = Asker(engine, 0, IDS[20:60])
    until(lambda: engine._queued_rows == 50)
    until(lambda: len(engine._queue) == 2)
    steps = iter(range(100))

    def one_at_a_time(_: EngineStats) -> None:
        if next(steps) == 2:
            forward.gate.clear()

    engine._on_forward = one_at_a_time
    forward.gate.set()
    np.testing.assert_array_equal(first.result(), expected_of(0, IDS[:10]))
    assert behind.value is None
    forward.gate.set()
    np.testing.assert_array_equal(behind.result(), expected_of(0, IDS[20:60]))
    assert max(forward.call_rows) == 4
    assert set(forward.seen.values()) == {1}


def test_request_that_overlaps_another_brings_only_what_is_new(build: Build, forward: FakeForward) -> None:
    engine = build()
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:20])
    assert forward.entered.wait(PATIENCE_S)
    fetched: list[int] = []

    def fetch(places: np.ndarray) -> np.ndarray:
        fetched.extend(places.tolist())
        return pixels_of(IDS[10:30][places])

    second = Asker(engine, 0, IDS[10:30], fetch)
    until(lambda: engine.stats().requests == 2)
    forward.gate.set()
    np.testing.assert_array_equal(first.result(), expected_of(0, IDS[:20]))
    np.testing.assert_array_equal(second.result(), expected_of(0, IDS[10:30]))
    assert fetched == list(range(10, 20))
    stats = engine.stats()
    assert (stats.hits, stats.joined, stats.forwards) == (0, 10, 30)


def test_answered_samples_need_no_pixels(build: Build) -> None:
    engine = build()
    serve(engine, 0, IDS)

    def fetch(places: np.ndarray) -> np.ndarray:
        raise AssertionError(f"asked for pixels of {places}")

    np.testing.assert_array_equal(serve(engine, 0, IDS[::-1], fetch), expected_of(0, IDS[::-1]))
    assert engine.stats().hits == NUM_SAMPLES


def test_queue_holds_requests_back_and_all_finish(build: Build, forward: FakeForward) -> None:
    engine = build(queue_rows=32)
    forward.gate.clear()
    askers = [Asker(engine, 0, IDS[start : start + 10]) for start in range(0, 200, 10)]
    until(lambda: engine.stats().requests == 20)
    assert engine.stats().queue_peak_rows <= 32
    forward.gate.set()
    for start, asker in zip(range(0, 200, 10), askers, strict=True):
        np.testing.assert_array_equal(asker.result(), expected_of(0, IDS[start : start + 10]))
    assert engine.stats().queue_peak_rows <= 32
    assert set(forward.seen.values()) == {1}


def test_request_larger_than_the_queue_is_served_when_it_is_alone(build: Build, forward: FakeForward) -> None:
    engine = build(queue_rows=8)
    askers = [Asker(engine, view, IDS[:50]) for view in range(3)]
    for view, asker in enumerate(askers):
        np.testing.assert_array_equal(asker.result(), expected_of(view, IDS[:50]))
    assert engine.stats().queue_peak_rows == 50
    assert set(forward.seen.values()) == {1}


def test_tiny_store_computes_again_and_still_answers_right(build: Build, forward: FakeForward) -> None:
    engine = build(store_rows=80)
    askers = []
    for _ in range(3):
        for start in range(0, 200, 20):
            ids = IDS[start : start + 20]
            askers.append((ids, Asker(engine, 0, ids)))
        for ids, asker in askers:
            np.testing.assert_array_equal(asker.result(), expected_of(0, ids))
    stats = engine.stats()
    assert stats.unique_views == NUM_SAMPLES
    assert stats.forwards > stats.unique_views
    assert stats.forwards == sum(forward.seen.values())
    assert stats.store_memory_bytes <= 80 * WIDTH * 2


def test_stats_follow_every_forward_and_cannot_be_changed_from_outside(build: Build) -> None:
    told: list[EngineStats] = []
    engine = build(on_forward=told.append)
    serve(engine, 0, IDS[:20])
    serve(engine, 0, IDS[10:40])
    until(lambda: len(told) == 4)
    assert [stats.forwards for stats in told] == [16, 20, 36, 40]
    engine.add_bytes(received=5, sent=7)
    engine.add_bytes(received=1)
    engine.stats().rows = -1
    stats = engine.stats()
    assert (stats.rows, stats.hits, stats.bytes_in, stats.bytes_out) == (50, 10, 6, 7)
    assert 0 < stats.busy_s < PATIENCE_S
    assert stats.cpu_s <= stats.process_cpu_s


def test_row_is_given_out_only_after_the_forward_that_made_it_was_reported(
    build: Build, forward: FakeForward
) -> None:
    reporting, go_on = threading.Event(), threading.Event()

    def slow_report(_: EngineStats) -> None:
        reporting.set()
        assert go_on.wait(PATIENCE_S)

    engine = build(on_forward=slow_report)
    first = Asker(engine, 0, IDS[:10])
    assert reporting.wait(PATIENCE_S)
    second = Asker(engine, 0, IDS[:5])  # its rows are in the store already
    until(lambda: engine.stats().requests == 2)
    time.sleep(0.05)
    assert first.value is second.value is None
    assert engine.stats().joined == 5
    go_on.set()
    np.testing.assert_array_equal(second.result(), expected_of(0, IDS[:5]))
    np.testing.assert_array_equal(first.result(), expected_of(0, IDS[:10]))
    assert forward.call_rows == [10]


# requests that mix views and repeat samples, as samplers make them


def sampled(seed: int, size: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Views and ids of a batch in which pairs come again."""
    draws = np.random.default_rng(seed)
    return draws.integers(5, 9, size), IDS[draws.integers(0, 12, size)]


def test_pairs_of_mixed_requests_are_forwarded_once_each(build: Build, forward: FakeForward) -> None:
    engine = build()
    batches = [sampled(seed) for seed in range(8)]
    askers = [Asker(engine, views, ids) for views, ids in batches for _ in range(2)]
    for (views, ids), asker in zip([batch for batch in batches for _ in range(2)], askers, strict=True):
        assert asker.result().tobytes() == expected_of(views, ids).tobytes()
    pairs = {pair for views, ids in batches for pair in zip(views.tolist(), ids.tolist(), strict=True)}
    assert set(forward.seen) == pairs
    assert set(forward.seen.values()) == {1}
    stats = engine.stats()
    assert stats.forwards == stats.unique_views == len(pairs)
    assert stats.rows == sum(len(ids) for _, ids in batches) * 2
    assert stats.hits + stats.joined + stats.forwards == stats.rows
    assert engine.stats().queue_peak_rows <= len(pairs)


def test_pair_that_comes_again_in_one_request_is_brought_and_computed_once(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    views, ids = np.array([1, 0, 1, 1, 0]), IDS[[7, 7, 7, 3, 7]]
    fetched: list[int] = []

    def fetch(places: np.ndarray) -> np.ndarray:
        fetched.extend(places.tolist())
        return pixels_of(ids[places])

    np.testing.assert_array_equal(serve(engine, views, ids, fetch), expected_of(views, ids))
    assert len(fetched) == 3
    assert set(zip(views[fetched].tolist(), ids[fetched].tolist(), strict=True)) == set(forward.seen)
    stats = engine.stats()
    assert (stats.rows, stats.hits, stats.joined, stats.forwards) == (5, 0, 2, 3)
    serve(engine, views, ids, fetch)
    stats = engine.stats()
    assert (stats.rows, stats.hits, stats.joined, stats.forwards) == (10, 3, 4, 3)


def test_a_view_met_in_a_mixed_request_is_not_computed_again_in_its_own_epoch(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    views = np.repeat([3, 4, 5], 10)
    serve(engine, views, np.tile(IDS[:10], 3))
    for view, asked in ((3, IDS[:10]), (4, IDS[:20]), (5, IDS[:10])):
        np.testing.assert_array_equal(serve(engine, view, asked), expected_of(view, asked))
    assert engine.stats().forwards == 40
    assert set(forward.seen.values()) == {1}


def test_requests_leave_nothing_pending_behind(build: Build) -> None:
    engine = build()
    for seed in range(4):
        serve(engine, *sampled(seed))
    serve(engine, 9, IDS)
    until(lambda: engine._pending == {})
    assert engine._queued_rows == 0
