"""Answers whether failures of a request, a forward or the store stay where they belong.

Does not use Ray or a model: the forward is arithmetic, so every value can be checked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from krd_ray.errors import DataError, TeacherError
from krd_ray.teacher.engine import TargetEngine
from krd_ray.teacher.store import TargetStore
from tests.unit.engine_parts import (
    IDS,
    NUM_SAMPLES,
    PATIENCE_S,
    Asker,
    Build,
    FakeForward,
    engines,
    expected_of,
    serve,
    until,
)


@pytest.fixture
def forward() -> FakeForward:
    return FakeForward()


@pytest.fixture
def build(tmp_path: Path, forward: FakeForward) -> Iterator[Build]:
    yield from engines(tmp_path, forward)


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
    np.testing.assert_array_equal(serve(engine, 0, IDS[:10]), expected_of(0, IDS[:10]))


def test_failed_forward_is_told_to_everybody_in_it_and_the_engine_lives_on(
    build: Build, forward: FakeForward
) -> None:
    engine = build()
    forward.gate.clear()
    first = Asker(engine, 0, IDS[:1])
    assert forward.entered.wait(PATIENCE_S)
    askers = [Asker(engine, 0, IDS[start : start + 10]) for start in (10, 20, 30)]
    until(lambda: len(engine._queue) == 3)
    forward.error = TeacherError("sample 31 is not finite")
    forward.gate.set()
    for asker in [first, *askers]:
        asker.wait()
        assert isinstance(asker.error, TeacherError)
    assert forward.call_rows == [1, 16, 10], "what is left of a request that failed is not forwarded"
    forward.error = None
    np.testing.assert_array_equal(serve(engine, 0, IDS), expected_of(0, IDS))
    stats = engine.stats()
    assert stats.forwards == stats.unique_views == NUM_SAMPLES
    assert stats.forward_calls == -(-NUM_SAMPLES // 16), "calls that failed do not count"


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
        serve(engine, 0, IDS[:26])
    serve(engine, 0, IDS[:25])


def test_unknown_sample_is_refused_before_anything_is_queued(build: Build, forward: FakeForward) -> None:
    engine = build()
    with pytest.raises(DataError, match="sample 2 is not in the shards"):
        serve(engine, 0, np.array([1, 2]))
    assert engine.stats().rows == 0
    assert forward.call_rows == []


def test_store_that_breaks_is_an_error_of_the_request_and_the_engine_lives_on(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build()

    def full(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(TargetStore, "put", full)
        with pytest.raises(MemoryError):
            serve(engine, 0, IDS[:10])
    np.testing.assert_array_equal(serve(engine, 0, IDS[:10]), expected_of(0, IDS[:10]))


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
