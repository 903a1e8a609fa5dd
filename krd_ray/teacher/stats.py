"""Answers what a replica writes down while it works, and how it is read back after its process has died.

Does not count (`engine` does); what memory a process holds is asked of the system here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray.util import metrics as ray_metrics

from krd_ray.atomic import naming_a_full_disk
from krd_ray.teacher.engine import EngineStats

INTERVAL_S = 1.0


def process_memory(process: psutil.Process | None = None) -> dict[str, int]:
    """Returns how much memory a process holds, and how much of it is its own.

        private = resident - shared

    Pages of the object store, of libraries and of other mapped files are resident in every process that has touched
    them but exist once: they are shared. Where the system does not count shared pages (macOS), none are taken off.

    Args:
        process: None: the calling one.
    Returns:
        `rss_bytes`: resident; `private_bytes`: resident and not shared.

    Example:
        >>> memory = process_memory()
        >>> 0 < memory["private_bytes"] <= memory["rss_bytes"]
        True
    """
    found = (process or psutil.Process()).memory_info()
    return {"rss_bytes": found.rss, "private_bytes": found.rss - getattr(found, "shared", 0)}


class StatsLog:
    """One replica's statistics file, a line per forward and at least one a second; and its gauges.

    Args:
        folder: of the teacher in the run directory.
        name: of the replica.
        is_actor: it is an actor of its own, which Ray may have started again.
    """

    def __init__(self, folder: Path, name: str | int, *, is_actor: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"stats-{name}.jsonl").open("a", encoding="utf-8")
        self._name, self._lock = name, threading.Lock()
        self._written = self._shown = time.monotonic()
        self._metrics = _Metrics(name)
        self._process, self._private_bytes_peak = psutil.Process(), 0
        self._restarted = int(is_actor and ray.get_runtime_context().was_current_actor_reconstructed)
        self.incarnation = self._count_starts()
        self.calibration_forwards = 0

    @property
    def is_due(self) -> bool:
        """True when nothing has been written for a second."""
        return time.monotonic() - self._written > INTERVAL_S

    def write(self, event: str, stats: EngineStats) -> None:
        """Appends a line, and shows the counters to Ray's metrics once a second."""
        memory = process_memory(self._process)
        self._private_bytes_peak = max(self._private_bytes_peak, memory["private_bytes"])
        row = {
            "event": event,
            "time": time.time(),
            "replica": self._name,
            "incarnation": self.incarnation,
            "restarted": self._restarted,
            "pid": os.getpid(),
            "calibration_forwards": self.calibration_forwards,
            **memory,
            "private_bytes_peak": self._private_bytes_peak,
            **asdict(stats),
        }
        with self._lock, naming_a_full_disk(Path(self._file.name)):
            self._written = time.monotonic()
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if self._written - self._shown > INTERVAL_S:
                self._shown = self._written
                self._metrics.set(stats)

    def _count_starts(self) -> int:
        """How often this replica had been started before within this run, from its own statistics."""
        with open(self._file.name, encoding="utf-8") as file:
            return sum('"event": "start"' in line for line in file)


class _Metrics:
    """The counters under Ray's metrics, for Prometheus; names get the prefix `ray_` there."""

    NAMES = (
        *("forwards", "unique_views", "hits", "joined", "requests", "bytes_in", "bytes_out", "busy_s"),
        *("store_memory_bytes", "store_disk_bytes", "queue_peak_rows"),
    )

    def __init__(self, replica: str | int) -> None:
        tags = {"replica": str(replica)}
        self._gauges = {
            name: ray_metrics.Gauge(f"krd_teacher_{name}", tag_keys=("replica",)) for name in self.NAMES
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)

    def set(self, stats: EngineStats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """Returns the last statistics of every incarnation of every replica, in order of start."""
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("stats-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = _parse(line)
            if row is not None:
                last[str(row["replica"]), row["incarnation"]] = row
    return [last[key] for key in sorted(last)]


def _parse(line: str) -> dict[str, Any] | None:
    """A row, or None for the half line that a killed process may leave."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
