"""Answers what an epoch has come to: means of the loss's terms, samples, seconds by kind, memory at its end.

Does not write them down (`loop` does, with `rundir.MetricsLog`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist

from krd_ray.teacher.client import ClientStats
from krd_ray.teacher.stats import process_memory
from krd_ray.train.reduce import sum_over_ranks


class SharedClock:
    """The CPU seconds of a process since its epoch began, and how many of them went into steps.

    Args:
        num_students: that train in the process.
    """

    def __init__(self, num_students: int) -> None:
        self._num_students, self._started = num_students, time.process_time()
        self.steps_s = 0.0

    def share(self) -> float:
        """Returns one student's share of what did not go into steps."""
        return (time.process_time() - self._started - self.steps_s) / self._num_students


class EpochAccount:
    """One rank's account of one student's epoch, from its start.

    Args:
        waits: returns counters that go on over epochs.
        world: number of ranks.
        clock: of the process, which students that share it share.
    """

    def __init__(self, waits: Callable[[], ClientStats], world: int, clock: SharedClock) -> None:
        self._world, self._clock = world, clock
        self._waits, self._before = waits, asdict(waits())
        self._started = self._shown = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._step_cpu_s, self._num_samples = 0.0, 0

    def add(self, num_samples: int, terms: dict[str, float], step_cpu_s: float) -> None:
        """Counts one step: its rows, the terms as batch means, the CPU seconds it took."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * num_samples
        self._step_cpu_s += step_cpu_s
        self._clock.steps_s += step_cpu_s
        self._num_samples += num_samples

    def is_due(self, every_s: float) -> bool:
        """Returns True when so much time has passed since it last did, or since the start."""
        if time.perf_counter() - self._shown <= every_s:
            return False
        self._shown = time.perf_counter()
        return True

    def so_far(self) -> dict[str, float]:
        """Returns this rank's own values up to now."""
        return self._values(None)

    def total(self, device: torch.device) -> dict[str, float]:
        """Returns sums over ranks, means over all their samples, images per second of all of them together.

        Memory (`rss_bytes`, `private_bytes`) is that of the largest rank.
        """
        return self._values(device) | self._memory(device)

    def _values(self, device: torch.device | None) -> dict[str, float]:
        wall_s = time.perf_counter() - self._started
        values = {name: value - self._before[name] for name, value in asdict(self._waits()).items()}
        values |= {f"sum_{name}": value for name, value in self._sums.items()}
        values |= {"num_samples": self._num_samples, "wall_s": wall_s}
        values |= {
            "cpu_s": self._step_cpu_s + self._clock.share(),
            "step_cpu_s": self._step_cpu_s,
        }
        if device is not None and self._world > 1:
            vector = torch.tensor(list(values.values()), dtype=torch.float64)
            values = dict(zip(values, sum_over_ranks(vector, device).tolist(), strict=True))
        means = {name: values.pop(f"sum_{name}") / values["num_samples"] for name in self._sums}
        values["compute_s"] = values.pop("wall_s") - values["wait_targets_s"] - values["wait_data_s"]
        values["images_per_s"] = values["num_samples"] / wall_s
        return means | values

    def _memory(self, device: torch.device) -> dict[str, int]:
        """What this process holds now, or the largest of all ranks."""
        memory = process_memory()
        if self._world == 1:
            return memory
        vector = torch.tensor(list(memory.values()), dtype=torch.int64, device=device)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        return dict(zip(memory, vector.tolist(), strict=True))
