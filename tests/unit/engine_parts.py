"""A forward that is arithmetic, requests in threads of their own, engines around them: for tests of the engine."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from krd_ray.teacher.engine import TargetEngine
from krd_ray.teacher.store import TargetStore

WIDTH = 4
NUM_SAMPLES = 200
PATIENCE_S = 20.0
IDS = np.arange(NUM_SAMPLES, dtype=np.int64) * 3 + 1


def expected_of(view: Any, sample_ids: np.ndarray) -> np.ndarray:
    """Outputs of samples in a view, or in one view each."""
    views = np.broadcast_to(view, sample_ids.shape)
    return (views[:, None] * 1000 + sample_ids[:, None] + np.arange(WIDTH) / 4).astype(np.float16)


def serve(engine: TargetEngine, view: Any, sample_ids: np.ndarray, fetch: Any = None) -> np.ndarray:
    """One request for samples in a view, or in one view each, with their own pixels unless told otherwise."""
    views = np.array(np.broadcast_to(view, sample_ids.shape), np.int64)
    return engine.serve(views, sample_ids, fetch or own_pixels(sample_ids))


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
        return expected_of(view_index, sample_ids)


class Asker:
    """One request in a thread of its own."""

    def __init__(self, engine: TargetEngine, view: Any, sample_ids: np.ndarray, fetch: Any = None) -> None:
        self.value: np.ndarray | None = None
        self.error: Exception | None = None
        arguments = (engine, view, sample_ids, fetch)
        self._thread = threading.Thread(target=self._ask, args=arguments, daemon=True)
        self._thread.start()

    def _ask(self, engine: TargetEngine, view: Any, sample_ids: np.ndarray, fetch: Any) -> None:
        try:
            self.value = serve(engine, view, sample_ids, fetch)
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


Build = Callable[..., TargetEngine]


def engines(folder: Path, forward: FakeForward) -> Iterator[Build]:
    """Yields a function that builds engines over a store of the given rows, and closes them at the end."""
    built: list[TargetEngine] = []

    def build(*, store_rows: int = 4096, disk_rows: int = 0, **more: Any) -> TargetEngine:
        store = TargetStore(
            folder / f"store{len(built)}",
            "key",
            IDS,
            WIDTH,
            memory_bytes=store_rows * WIDTH * 2,
            disk_bytes=disk_rows * WIDTH * 2,
        )
        settings = {"micro_batch": 16, "queue_rows": 1024, **more}
        built.append(TargetEngine(forward, store, width=WIDTH, **settings))
        return built[-1]

    yield build
    forward.gate.set()
    for engine in built:
        close(engine)
