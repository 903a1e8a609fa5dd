"""Students that tests train on a real cluster, and what they leave behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from krd_ray.config import Resources
from krd_ray.train.rundir import StudentDir
from krd_ray.train.students import StudentsRun, run_together
from krd_ray.train.worker_spec import WorkerSpec

EPOCHS = 12
TICK_S = 0.02
WORKERS = {"ray::TrainWorker", "ray::RayTrainWorker"}


def named(spec: WorkerSpec, name: str, **train: Any) -> WorkerSpec:
    folder = Path(spec.folder).with_name(name)
    return replace(spec, student=name, folder=str(folder), train=spec.train.model_copy(update=train))


def run_of(*specs: WorkerSpec, workers: int = 1) -> StudentsRun:
    return StudentsRun(specs, workers, Resources(num_cpus=0.25), max_failures=2)


def train(
    *runs: StudentsRun, tick: Callable[[dict[str, str]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Trains to the end and returns the results."""
    run_together(runs, tick, TICK_S)
    return [result for run in runs for result in run.finish()]


def rows_of(spec: WorkerSpec, split: str) -> list[dict[str, Any]]:
    return [row for row in StudentDir(Path(spec.folder)).rows() if row["split"] == split]


def weights_of(spec: WorkerSpec) -> dict[str, Any]:
    return load_file(StudentDir(Path(spec.folder)).weights)


def epochs_of(spec: WorkerSpec) -> list[int]:
    return [row["epoch"] for row in rows_of(spec, "coverage")]


def ray_processes() -> list[tuple[int, str]]:
    """Pid and command line of what the raylet of this process's session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append((process.pid, " ".join(process.cmdline())))
    return [(pid, line) for pid, line in found if line.startswith("ray::")]


def train_worker_pids() -> list[int]:
    """Processes of this cluster that train."""
    return [pid for pid, line in ray_processes() if line.split(".")[0] in WORKERS]


def kill_after(epochs: int, spec: WorkerSpec) -> Any:
    """A tick that kills the one training process once it has finished that many epochs."""
    killed: list[int] = []

    def tick(_: dict[str, str]) -> None:
        if not killed and len(epochs_of(spec)) >= epochs:
            (pid,) = train_worker_pids()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    tick.killed = killed  # type: ignore[attr-defined]
    return tick
