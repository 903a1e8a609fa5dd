"""Answers what a run has to compute, in seconds per image, and what sharing the teacher can save of it.

Does not measure (`costs` does) and does not divide a machine (`planner` does).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from krd_ray.train.costs import Cost

Placement = Literal["actors", "in_process", "stored"]


@dataclass(frozen=True)
class Machine:
    """What a run has to compute on.

    Args:
        cores: > 0.
        gpus: number of cards.
        reading_cpus: of the cores, what Ray reserves for reading shards.
    """

    cores: float
    gpus: int = 0
    reading_cpus: float = 0.0

    def room(self, device: str) -> float:
        """Returns how much there is of a device: cores for `cpu`, cards for `cuda`."""
        return float(self.gpus) if device == "cuda" else self.cores


@dataclass(frozen=True)
class TeacherWork:
    """The teacher's part of a run.

    Args:
        cost: C_T.
        unique_views: (view, image) pairs that all its students together need, each counted once.
        placement: as in the config.
        fixed_threads: `teacher.num_threads`; None: as many as its CPUs.
        store_rows: answers that the store holds, all replicas together; None: enough.
    """

    cost: Cost
    unique_views: int
    placement: Placement = "actors"
    fixed_threads: int | None = None
    store_rows: int | None = None


@dataclass(frozen=True)
class StudentWork:
    """A student's part of a run, or that of several which share a process.

    Args:
        name, model, epochs, workers: as in the config.
        cost: C_i, of all of them together.
        taught: they learn from the teacher.
        fixed_threads: `train.num_threads`; None: as many as its CPUs.
        settings: dotted names of their entries in the config file, which others may share; empty: `students.NAME`.
        num_students: that share the process.
    """

    name: str
    model: str
    cost: Cost
    epochs: int
    workers: int = 1
    taught: bool = True
    fixed_threads: int | None = None
    settings: tuple[str, ...] = ()
    num_students: int = 1

    @property
    def limit(self) -> float:
        """Cores or cards that its workers can keep busy: no more than they have threads, or one card each."""
        each = 1.0 if self.cost.device == "cuda" else float(self.fixed_threads or math.inf)
        return self.workers * each


@dataclass(frozen=True)
class RunWork:
    """A whole run.

    Args:
        teacher: as configured; None for a run without one.
        students: one at least; those that share a process are one entry.
        num_rows: training images.
        cycle: `views.cycle`.
        at_once: `students_at_once`.
    """

    teacher: TeacherWork | None
    students: tuple[StudentWork, ...]
    num_rows: int
    cycle: int | None = None
    at_once: int | None = None

    @functools.cached_property
    def taught(self) -> tuple[StudentWork, ...]:
        """Students that learn from the teacher."""
        return tuple(student for student in self.students if student.taught and self.teacher)

    @property
    def num_taught(self) -> int:
        """How many students those are."""
        return sum(student.num_students for student in self.taught)

    @functools.cached_property
    def placed(self) -> TeacherWork | None:
        """The teacher where it had better work; None when nobody learns from it.

        Inside the student's process where one student needs each answer once; not inside several processes.
        """
        if self.teacher is None or not self.taught:
            return None
        place = self.teacher.placement
        if place == "in_process" and len(self.taught) > 1:
            place = "actors"
        if place == "actors" and len(self.taught) == 1 and self.uses <= 1 and self.on_one_device:
            place = "in_process"
        return replace(self.teacher, placement=place)

    @property
    def on_one_device(self) -> bool:
        """True when the teacher and all who learn from it compute on the same kind of device."""
        return {self.teacher and self.teacher.cost.device} == {student.cost.device for student in self.taught}

    @property
    def samples(self) -> int:
        """Answers that students need, each counted as often as it is used."""
        return self.num_rows * sum(student.epochs * student.num_students for student in self.taught)

    @property
    def uses(self) -> float:
        """How often an answer is used, on average."""
        assert self.teacher is not None
        return self.samples / self.teacher.unique_views

    @property
    def views_per_image(self) -> float:
        """u: unique views per image and epoch of the longest training; 0 without a teacher."""
        return self._views_over(max((student.epochs for student in self.taught), default=1))

    @property
    def first_views(self) -> float:
        """The same over the epochs in which all of them are computed: `views.cycle` epochs, or all."""
        longest = max((student.epochs for student in self.taught), default=1)
        return self._views_over(min(self.cycle or longest, longest))

    @property
    def teacher_frac(self) -> float:
        """Share of the teacher's forwards in the cost of one run per student, the teacher inside each."""
        assert self.teacher is not None
        forwards = self.samples * self.teacher.cost.seconds
        return forwards / (forwards + self._steps_s())

    @property
    def a_star(self) -> float | None:
        """Bound on the gain of sharing, as in the ledger: a run per student, over one run that shares the teacher.

            A* = sum_i n_i * (C_T + C_i) / (unique views * C_T + sum_i n_i * C_i),   n_i = epochs_i * num_rows

        None without a teacher, and where the costs are of two kinds of device and have no sum.

        Example:
            >>> teacher = TeacherWork(Cost(4.0, "cpu", 1), unique_views=100)
            >>> students = [StudentWork(name, "net", Cost(1.0, "cpu", 1), epochs=1) for name in ("a", "b")]
            >>> RunWork(teacher, tuple(students), num_rows=100).a_star == (2 * 4 + 2) / (4 + 2)
            True
        """
        if self.teacher is None or not self.taught or not self.on_one_device:
            return None
        forward, steps = self.teacher.cost.seconds, self._steps_s()
        return (self.samples * forward + steps) / (self.teacher.unique_views * forward + steps)

    def _views_over(self, epochs: int) -> float:
        return self.teacher.unique_views / (self.num_rows * epochs) if self.teacher and self.taught else 0.0

    def _steps_s(self) -> float:
        return self.num_rows * sum(student.epochs * student.cost.seconds for student in self.taught)
