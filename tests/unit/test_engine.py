"""Answers whether the engine forwards each sample once, whoever asks, and whether failures stay where they belong.

Does not use Ray or a model: the forward is arithmetic, so every value can be checked.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krd_ray.errors import DataError, TeacherError
from krd_ray.teacher.engine import EngineStats, TargetEngine
from krd_ray.teacher.store import TargetStore

WIDTH = 4
NUM_SAMPLES = 200
PATIENCE_S = 20.0
IDS = np.arange(NUM_SAMPLES, dtype=np.int64) * 3 + 1


def expected_of(view: int, sample_ids: np.ndarray) -> np.ndarray:
    return (view * 1000 + sample_ids[:, None] + np.arange(WIDTH) / 4).astype(np.float16)


def pixels_of(sample_ids: np.ndarray) -> np.ndarray:
    """Images that say which sample they show."""
    return np.repeat(sample_ids.astype(np.uint32)[:, None], 3, axis=1).view(np.uint8).reshape(-1, 2, 2, 3)


class FakeForward:
    """Counts what it is asked; waits for `gate` where it is closed; raises `error` where it is set."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, int]] = Counter()
        self.call_rows: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def __call__(self, images: np.ndarray, sample_ids: np.ndarray, view_index: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S), "the test forgot to open the gate"
        self.call_rows.append(len(sample_ids))
        if self.error is not None:
            raise self.error
        np.testing.assert_array_equal(images, pixels_of(sample_ids))
        self.seen.update(zip(view_index.tolist(), sample_ids.tolist(), strict=True))
        return (view_index[:, None] * 1000 + sample_ids[:, None] + np.arange(WIDTH) / 4).astype(np.float16)


class Asker:
    """One request in a thread of its own."""

    def __init__(self, engine: TargetEngine, view: int, sample_ids: np.ndarray, fetch: Any = None) -> None:
        self.value: np.ndarray | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(
            target=self._ask, args=(engine, view, sample_ids, fetch or own_pixels(sample_ids)), daemon=True
        )
        self._thread.start()

    def _ask(self, engine: TargetEngine, view: int, sample_ids: np.ndarray, fetch: Any) -> None:
        try:
            self.value = engine.serve(view, sample_ids, fetch)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def result(self) -> np.ndarray:
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value

    def wait(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "deadlock: a request was never answered"


def own_pixels(sample_ids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda places: pixels_of(sample_ids[places])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.001)


def close(engine: TargetEngine) -> None:
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive(), "deadlock: close() never returned"


@pytest.fixture
def forward() -> FakeForward:
    return FakeForward()


@pytest.fixture
def build(tmp_path: Path, forward: FakeForward) -> Iterator[Callable[..., TargetEngine]]:
    """Builds engines over a store of the given rows, and closes them at the end."""
    engines: list[TargetEngine] = []

    def build_engine(*, store_rows: int = 4096, disk_rows: int = 0, **more: Any) -> TargetEngine:
        store = TargetStore(
            tmp_path / f"store{len(engines)}",
            "key",
            IDS,
            WIDTH,
            memory_bytes=store_rows * WIDTH * 2,
            disk_bytes=disk_rows * WIDTH * 2,
        )
        settings = {"micro_batch": 16, "queue_rows": 1024, **more}
        engines.append(TargetEngine(forward, store, width=WIDTH, **settings))
        return engines[-1]

    yield build_engine
    forward.gate.set()
    for engine in engines:
        close(engine)


Build = Callable[..., TargetEngine]


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


def test_requests_that_wait_become_one_forward(build: Build, forward: FakeForward) -> None:
    engine = build()
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:4])
    assert forward.entered.wait(PATIENCE_S)
    others = [Asker(engine, 0, IDS[start : start + 10]) for start in range(10, 60, 10)]
    until(lambda: engine.stats().requests == 6)
    forward.gate.set()
    for asker in [first, *others]:
        asker.result()
    assert forward.call_rows == [4, 50]
    assert engine.stats().forward_calls == 2
    assert engine.stats().padded_rows == 12 + 14


def test_forward_takes_eight_micro_batches_at_most(build: Build, forward: FakeForward) -> None:
    engine = build(micro_batch=4)
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:1])
    assert forward.entered.wait(PATIENCE_S)
    others = [Asker(engine, 0, IDS[start : start + 10]) for start in range(10, 90, 10)]
    until(lambda: engine.stats().requests == 9)
    forward.gate.set()
    for asker in [first, *others]:
        asker.result()
    assert max(forward.call_rows) <= 32
    assert sum(forward.call_rows) == 81


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
    engine.serve(0, IDS, own_pixels(IDS))

    def fetch(places: np.ndarray) -> np.ndarray:
        raise AssertionError(f"asked for pixels of {places}")

    np.testing.assert_array_equal(engine.serve(0, IDS[::-1], fetch), expected_of(0, IDS[::-1]))
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


def test_unreadable_pixels_fail_the_request_that_brought_them_and_no_other(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    forward.gate.clear()
    blocker = Asker(engine, 1, IDS[:1])
    assert forward.entered.wait(PATIENCE_S)

    waited_for = threading.Event()

    def broken(_: np.ndarray) -> np.ndarray:
        assert waited_for.wait(PATIENCE_S)
        raise OSError("the object is lost")

    bad = Asker(engine, 0, IDS[:10], broken)
    until(lambda: engine.stats().requests == 2)
    joiner = Asker(engine, 0, IDS[5:15])  # waits for rows that the bad request promised
    bystander = Asker(engine, 0, IDS[20:30])
    until(lambda: engine.stats().requests == 4)
    assert engine.stats().joined == 5
    waited_for.set()
    bad.wait()
    forward.gate.set()
    assert isinstance(bad.error, OSError)
    np.testing.assert_array_equal(joiner.result(), expected_of(0, IDS[5:15]))
    np.testing.assert_array_equal(bystander.result(), expected_of(0, IDS[20:30]))
    blocker.result()
    np.testing.assert_array_equal(engine.serve(0, IDS[:10], own_pixels(IDS[:10])), expected_of(0, IDS[:10]))


def test_failed_forward_is_told_to_everybody_in_it_and_the_engine_lives_on(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:1])
    assert forward.entered.wait(PATIENCE_S)
    askers = [Asker(engine, 0, IDS[start : start + 10]) for start in (10, 20, 30)]
    until(lambda: engine.stats().requests == 4)
    forward.error = TeacherError("sample 31 is not finite")
    forward.gate.set()
    for asker in [first, *askers]:
        asker.wait()
        assert isinstance(asker.error, TeacherError)
    assert forward.call_rows == [1, 30]
    forward.error = None
    np.testing.assert_array_equal(engine.serve(0, IDS, own_pixels(IDS)), expected_of(0, IDS))
    stats = engine.stats()
    assert stats.forwards == stats.unique_views == NUM_SAMPLES
    assert stats.forward_calls == 1, "calls that failed do not count"


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


def test_full_disk_reaches_the_request_as_an_error(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()

    def full(*_: object) -> None:
        raise TeacherError("the target store cannot write")

    with monkeypatch.context() as patch:
        patch.setattr(TargetStore, "put", full)
        with pytest.raises(TeacherError, match="cannot write"):
            Asker(engine, 0, IDS[:10]).result()
    np.testing.assert_array_equal(Asker(engine, 0, IDS[:10]).result(), expected_of(0, IDS[:10]))
    assert (engine.stats().forwards, engine.stats().unique_views) == (20, 10)


def test_closing_fails_who_still_waits_and_who_comes_later(build: Build, forward: FakeForward) -> None:
    engine = build()
    forward.gate.clear()
    running = Asker(engine, 0, IDS[:5])
    assert forward.entered.wait(PATIENCE_S)
    waiting = Asker(engine, 0, IDS[5:10])
    until(lambda: engine.stats().requests == 2)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    waiting.wait()
    assert isinstance(waiting.error, TeacherError)
    assert "was closed" in waiting.error.message
    forward.gate.set()
    running.wait()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    late = Asker(engine, 0, IDS[:5])
    late.wait()
    assert isinstance(late.error, TeacherError)


def test_request_too_large_for_the_store_is_refused_with_the_settings_to_change(build: Build) -> None:
    engine = build(store_rows=100)
    with pytest.raises(TeacherError, match=r"teacher\.memory_bytes or teacher\.disk_bytes"):
        engine.serve(0, IDS[:26], own_pixels(IDS[:26]))
    engine.serve(0, IDS[:25], own_pixels(IDS[:25]))


def test_unknown_sample_is_refused_before_anything_is_queued(build: Build, forward: FakeForward) -> None:
    engine = build()
    with pytest.raises(DataError, match="sample 2 is not in the shards"):
        engine.serve(0, np.array([1, 2]), own_pixels(IDS))
    assert engine.stats().rows == 0
    assert forward.call_rows == []


def test_stats_follow_every_forward_and_cannot_be_changed_from_outside(build: Build) -> None:
    told: list[EngineStats] = []
    engine = build(on_forward=told.append)
    engine.serve(0, IDS[:20], own_pixels(IDS[:20]))
    engine.serve(0, IDS[10:40], own_pixels(IDS[10:40]))
    until(lambda: len(told) == 2)
    assert [stats.forwards for stats in told] == [20, 40]
    engine.add_bytes(received=5, sent=7)
    engine.add_bytes(received=1)
    engine.stats().rows = -1
    stats = engine.stats()
    assert (stats.rows, stats.hits, stats.bytes_in, stats.bytes_out) == (50, 10, 6, 7)
    assert 0 < stats.busy_s < PATIENCE_S
    assert stats.cpu_s <= stats.process_cpu_s


def test_store_that_breaks_is_an_error_of_the_request_and_the_engine_lives_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()

    def full(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(TargetStore, "put", full)
        with pytest.raises(MemoryError):
            engine.serve(0, IDS[:10], own_pixels(IDS[:10]))
    np.testing.assert_array_equal(engine.serve(0, IDS[:10], own_pixels(IDS[:10])), expected_of(0, IDS[:10]))


def test_forward_thread_that_dies_tells_everybody_instead_of_hanging(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def impossible(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(TargetEngine, "_tell", impossible)
    asker = Asker(engine, 0, IDS[:10])
    asker.wait()
    assert isinstance(asker.error, TeacherError)
    assert "forward thread died: RuntimeError: a bug" in str(asker.error)
