"""Answers which students train in one process: those that agree in all that a process does once for all of them.

Does not start anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from krd_ray.config import RunConfig, StudentConfig

T = TypeVar("T")
# What a process has once: its batches, their order and length, its memory layout, its threads, its restarts.
ONCE = (
    "epochs",
    "batch_size",
    "sampler",
    "channels_last",
    "in_flight",
    "max_failures",
    "progress_every_s",
    "num_threads",
    "niceness",
)


def processes_of(config: RunConfig, students: Sequence[StudentConfig]) -> list[tuple[StudentConfig, ...]]:
    """Lays students that are alike in `ONCE`, seed, workers and resources together, `students_per_process` at most.

    Students of a teacher and students without one stay apart. A process with several workers is one per worker.

    Args:
        config: of the run.
        students: some of its students.
    Returns:
        One tuple per process, in the order of their first students.

    Example:
        >>> config = RunConfig.model_validate(
        ...     {"name": "x", "data": {"dir": "d"}, "students_per_process": 2,
        ...      "students": [{"name": n, "model": "resnet8", "seed": s} for n, s in (("a", 0), ("b", 1), ("c", 0))]})
        >>> [[student.name for student in process] for process in processes_of(config, config.students)]
        [['a', 'c'], ['b']]
    """
    full: list[list[StudentConfig]] = []
    growing: dict[str, list[StudentConfig]] = {}
    for student in students:
        kind = _kind_of(config, student)
        if kind not in growing or len(growing[kind]) == config.students_per_process:
            growing[kind] = []
            full.append(growing[kind])
        growing[kind].append(student)
    return [tuple(process) for process in full]


def heaviest_first(
    processes: Iterable[T],
    num: int | None,
    *,
    load: Callable[[T], float | tuple[float, float]],
    size: Callable[[T], int],
) -> list[T]:
    """Returns the processes of largest load that train at the same time; a process starts as a whole.

    Args:
        processes: in whatever form.
        num: students at most, but one process at least; None: all.
        load, size: what a process loads its machine with, and how many students it has.
    """
    found: list[T] = []
    for process in sorted(processes, key=load, reverse=True):
        if num is None or not found or sum(map(size, found)) + size(process) <= num:
            found.append(process)
    return found


def load_of(process: Sequence[StudentConfig]) -> tuple[float, float]:
    """Returns the GPUs and CPUs that a process reserves, all its workers together."""
    first = process[0]
    return first.workers * first.resources.num_gpus, first.workers * first.resources.num_cpus


def _kind_of(config: RunConfig, student: StudentConfig) -> str:
    """A name for all that students of a process must agree in."""
    train = config.train_of(student).model_dump()
    once = {name: train[name] for name in ONCE}
    needs_teacher = config.loss_of(student).needs_teacher
    place = (student.workers, student.resources, student.strategy)
    return f"{config.seed_of(student)} {needs_teacher} {place} {once}"
