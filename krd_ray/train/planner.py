"""Answers how teacher and students should share a machine so that none of them waits for another.

Does not measure (`costs` does) and reads nothing: pure arithmetic on costs per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from krd_ray.teacher.spec import threads_for
from krd_ray.train.costs import Cost
from krd_ray.train.plan_work import Machine, Placement, RunWork, StudentWork, TeacherWork
from krd_ray.train.processes import heaviest_first

GRAIN = 0.01  # of a core or a card: shares are rounded down to it before Ray is asked for them
TEACHER = ("teacher",)
UNITS = {"cpu": "cores", "cuda": "GPUs"}


@dataclass(frozen=True)
class Share:
    """What the teacher or a student gets.

    Args:
        name, model: for the table.
        cost: per image.
        amount: cores or cards that all its processes together keep busy.
        processes: replicas or workers.
        reserved: cores or cards to reserve per process, a multiple of GRAIN.
        num_threads: CPU threads of each process with these settings.
        settings: dotted names of the entries in the config file that decide its resources.
    """

    name: str
    model: str
    cost: Cost
    amount: float
    processes: int
    reserved: float
    num_threads: int
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How a run should go on a machine.

    Args:
        machine: what it is for.
        num_rows: training images.
        placement: where the teacher should work; None when nobody learns from it.
        teacher: its share; None where it has no process of its own.
        students: their shares, all of them, also where only some train at once.
        at_once: students that train together.
        rate: images/s of each student while all advance in step; with `views.cycle` the mean over the run.
        views_per_image: u, unique views per image and epoch of the longest training; None without a teacher.
        a_star: bound on the gain of sharing; None without a teacher or over two kinds of device.
        settings: `a.b=c`.
    """

    machine: Machine
    num_rows: int
    placement: Placement | None
    teacher: Share | None
    students: tuple[Share, ...]
    at_once: int
    rate: float
    views_per_image: float | None
    a_star: float | None
    settings: tuple[str, ...]

    @property
    def epoch_s(self) -> float:
        """Seconds per epoch of each student."""
        return self.num_rows / self.rate

    @property
    def shares(self) -> tuple[Share, ...]:
        """All shares, the teacher's first."""
        return self.students if self.teacher is None else (self.teacher, *self.students)


def make_plan(work: RunWork, machine: Machine) -> Plan:
    """Gives every process the share of its device with which all students advance in step.

        r = min over devices of  room / (u * C_T + sum_i C_i)         images/s of each student
        share of the teacher  u * C_T * r,   of student i  C_i * r    cores, or cards

    The sums are over what computes on the device, of the students over the heaviest `at_once`. Nobody advances faster
    than a student whose number of threads is fixed: r <= threads / C_i. With cycled views u is the mean over the run,
    but the teacher gets replicas enough for the epochs in which it computes.
    """
    teacher, group = work.placed, heaviest(work, machine)
    views = work.views_per_image
    rate = _rate(teacher, group, machine, views)
    shares = [_student_share(student, teacher, views, rate) for student in work.students]
    own = None
    if teacher and teacher.placement == "actors":
        peak = work.first_views * teacher.cost.seconds * _rate(teacher, group, machine, work.first_views)
        own = _teacher_share(teacher, views * teacher.cost.seconds * rate, peak)
        shares = [own, *shares]
    names = [student.name for student in group]
    together = [share is own or share.name in names for share in shares]
    shares = _with_reservations(shares, machine, together)
    return Plan(
        machine,
        work.num_rows,
        placement=teacher.placement if teacher else None,
        teacher=shares[0] if own else None,
        students=tuple(shares[1:] if own else shares),
        at_once=sum(student.num_students for student in group),
        rate=rate,
        views_per_image=views if teacher else None,
        a_star=work.a_star,
        settings=tuple(_settings(work, shares)),
    )


def heaviest(work: RunWork, machine: Machine) -> list[StudentWork]:
    """Returns who trains at the same time, were they the most expensive ones; a process starts as a whole."""

    def load(student: StudentWork) -> float:
        return student.cost.seconds / machine.room(student.cost.device)

    return heaviest_first(work.students, work.at_once, load=load, size=lambda student: student.num_students)


def _rate(teacher: TeacherWork | None, group: Sequence[StudentWork], machine: Machine, views: float) -> float:
    load = dict.fromkeys(UNITS, 0.0)
    for student in group:
        load[student.cost.device] += seconds_of(student, teacher, views)
    if teacher and teacher.placement == "actors":
        load[teacher.cost.device] += views * teacher.cost.seconds
    balanced = [machine.room(device) / seconds for device, seconds in load.items() if seconds > 0]
    return min(*balanced, *(student.limit / seconds_of(student, teacher, views) for student in group))


def seconds_of(student: StudentWork, teacher: TeacherWork | None, views: float) -> float:
    """Seconds per image in a student's workers, with the teacher's where it lives there."""
    inside = student.taught and teacher is not None and teacher.placement == "in_process"
    return student.cost.seconds + (views * teacher.cost.seconds if inside and teacher else 0.0)


def _student_share(student: StudentWork, teacher: TeacherWork | None, views: float, rate: float) -> Share:
    amount = seconds_of(student, teacher, views) * rate
    return Share(
        student.name,
        student.model,
        student.cost,
        amount,
        student.workers,
        reserved=amount / student.workers,
        num_threads=student.fixed_threads or 0,
        settings=student.settings or (f"students.{student.name}",),
    )


def _teacher_share(teacher: TeacherWork, amount: float, peak: float) -> Share:
    """Replicas and threads enough for the epochs in which it computes most; threads that wait cost nothing."""
    each = 1 if teacher.cost.device == "cuda" else teacher.cost.num_threads
    replicas = max(1, math.ceil(round(peak / each, 6)))
    threads = teacher.fixed_threads or math.ceil(round(peak / replicas, 6))
    return Share("teacher", "-", teacher.cost, amount, replicas, amount / replicas, threads, TEACHER)


def _with_reservations(shares: Sequence[Share], machine: Machine, together: Sequence[bool]) -> list[Share]:
    """Reservations that fit: what must be alike reserves the largest; all that run together fit on the machine."""
    shared = any(len(share.settings) > 1 for share in shares)
    alike = [_alike(share, shared=shared) for share in shares]
    largest: dict[str, float] = {}
    for share, kind in zip(shares, alike, strict=True):
        largest[kind] = max(largest.get(kind, 0.0), share.reserved)
    wanted = dict.fromkeys(UNITS, 0.0)
    for share, kind, counts in zip(shares, alike, together, strict=True):
        wanted[share.cost.device] += counts * share.processes * largest[kind]
    room = {"cpu": machine.cores - machine.reading_cpus, "cuda": float(machine.gpus)}
    fits = {device: min(1.0, room[device] / wanted[device]) for device in UNITS if wanted[device]}
    return [
        _reserve(share, largest[kind] * fits.get(share.cost.device, 1.0))
        for share, kind in zip(shares, alike, strict=True)
    ]


def _alike(share: Share, *, shared: bool) -> str:
    """A name for what reserves the same: entries of one setting, or all students of a device where some share
    processes, as only those that reserve the same can."""
    return f"students on {share.cost.device}" if shared and share.settings != TEACHER else share.settings[0]


def _reserve(share: Share, amount: float) -> Share:
    reserved = round(max(1, math.floor(round(amount / GRAIN, 6))) * GRAIN, 2)
    on_gpu = share.cost.device == "cuda"
    threads = share.cost.num_threads if on_gpu else share.num_threads or threads_for(reserved, None)
    return replace(share, reserved=reserved, num_threads=threads)


def _settings(work: RunWork, shares: Sequence[Share]) -> Iterator[str]:
    given, placed = work.teacher, work.placed
    if given and placed and placed.placement != given.placement:
        yield f"teacher.placement={placed.placement}"
    texts: list[str] = []
    for share in shares:
        on_gpu = share.cost.device == "cuda"
        if share.settings == TEACHER:
            texts.append(f"teacher.replicas={share.processes}")
            if (
                given
                and given.fixed_threads is None
                and share.num_threads > threads_for(share.reserved, None)
            ):
                texts.append(f"teacher.num_threads={share.num_threads}")
        elif on_gpu and share.processes > 1:
            continue  # workers of one student need whole cards, which they have
        what = "num_gpus" if on_gpu else "num_cpus"
        texts += [f"{setting}.resources.{what}={share.reserved:g}" for setting in share.settings]
    yield from dict.fromkeys(texts)
