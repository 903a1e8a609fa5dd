"""Answers what a run's cluster costs besides teacher and students: driver, raylet, GCS, controllers, agents.

Does not count teacher and students: they count themselves, per epoch, and the ledger has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

COUNTED_ELSEWHERE = ("ray::Replica", "ray::TrainWorker")
EVERY_S = 0.5

Curve = list[tuple[float, float]]


@contextmanager
def others_cpu() -> Iterator[Curve]:
    """Samples the CPU seconds of this process and its descendants, but for teacher and students, during the block.

    Returns:
        (time, CPU seconds so far), growing while the block runs; a process that has ended keeps what it had.
    """
    curve: Curve = []
    seen: dict[int, float] = {}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(EVERY_S):
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                _look(process, seen)
            curve.append((time.time(), sum(seen.values())))

    thread = threading.Thread(target=sample, name="others-cpu", daemon=True)
    thread.start()
    try:
        yield curve
    finally:
        over.set()
        thread.join()


def _look(process: psutil.Process, seen: dict[int, float]) -> None:
    try:
        if not " ".join(process.cmdline()).startswith(COUNTED_ELSEWHERE):
            spent = process.cpu_times()
            seen[process.pid] = spent.user + spent.system
    except psutil.Error:  # it has ended since
        return
