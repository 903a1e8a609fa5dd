"""Answers what `krd plan` says: it measures a config's networks here, has the run planned and prints the plan.

Does not start Ray and does not run the plan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from krd_ray.config import RunConfig, StudentConfig
from krd_ray.config_io import load_config
from krd_ray.data.reading import READ_CPUS
from krd_ray.errors import ConfigError
from krd_ray.train.costs import Cost, Costs, count_views, measure_costs, num_gpus_here, taught_of
from krd_ray.train.places import few
from krd_ray.train.plan_warnings import plan_warnings
from krd_ray.train.plan_work import Machine, RunWork, StudentWork, TeacherWork
from krd_ray.train.planner import UNITS, Plan, Share, make_plan
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.processes import processes_of

WIDTH_WHEN_PIPED = 110


def plan_file(
    path: Path, settings: Sequence[str], *, seconds: float, say: Callable[[str], None]
) -> tuple[Plan, list[str]]:
    """Measures the networks of a config on this machine and plans its run.

    Args:
        path: YAML file.
        settings: `a.b=c` laid over it.
        seconds: of measuring per network, > 0.
        say: gets a line before each measurement.
    Returns:
        The plan and its warnings.
    Raises:
        KrdError: as `prepare` and `measure_costs`.
    """
    prepared = prepare(load_config(path, settings))
    config = prepared.config
    costs = measure_costs(prepared, seconds=seconds, say=say)
    taught = taught_of(config)
    entries = _entries_of(path, settings, config.students)
    students = []
    for process in processes_of(config, config.students):
        first, train = process[0], config.train_of(process[0])
        models = list(dict.fromkeys(student.model for student in process))
        students.append(
            StudentWork(
                few([student.name for student in process]),
                few(models),
                _together([costs.students[student.name] for student in process]),
                epochs=train.epochs,
                workers=first.workers,
                taught=first in taught,
                fixed_threads=train.num_threads,
                settings=tuple(dict.fromkeys(entries[student.name] for student in process)),
                num_students=len(process),
            )
        )
    work = RunWork(
        _teacher_work(prepared, costs),
        tuple(students),
        num_rows=prepared.train.num_rows,
        cycle=config.views.cycle,
        at_once=config.students_at_once,
    )
    plan = make_plan(work, machine_of(config))
    return plan, plan_warnings(work, plan)


def print_plan(plan: Plan, warnings: Sequence[str]) -> None:
    """Prints costs, shares, bound, settings and warnings."""
    piped = not sys.stdout.isatty()
    console = Console(file=sys.stdout, width=WIDTH_WHEN_PIPED if piped else None, highlight=False)
    console.print(_table(plan))
    for line in [*_lines(plan), *(f"warning: {warning}" for warning in warnings)]:
        console.print(line, markup=False, soft_wrap=True)


def machine_of(config: RunConfig) -> Machine:
    """Returns what a run of this config has here; more logical CPUs than cores make nothing faster."""
    cores = float(os.cpu_count() or 1)
    reading = 0.0 if config.data.cache == "memory" else READ_CPUS
    return Machine(min(config.ray.num_cpus or cores, cores), num_gpus_here(), reading)


def _together(costs: Sequence[Cost]) -> Cost:
    """Students that share a process take their steps one after the other."""
    return replace(costs[0], seconds=sum(cost.seconds for cost in costs))


def _teacher_work(prepared: Prepared, costs: Costs) -> TeacherWork | None:
    config = prepared.config.teacher
    if config is None or costs.teacher is None:
        return None
    budget = config.disk_bytes + (0 if config.persist else config.memory_bytes)
    return TeacherWork(
        costs.teacher,
        count_views(prepared, taught_of(prepared.config)),
        placement=config.placement,
        fixed_threads=config.num_threads,
        store_rows=config.replicas * budget // (2 * costs.teacher_width),
    )


def _entries_of(path: Path, settings: Sequence[str], students: Sequence[StudentConfig]) -> dict[str, str]:
    """Where the file keeps each student: below `students`, or, made by `compare`, below its model there."""
    models: list[str] = []
    entries = {}
    for student in students:
        entries[student.name] = f"students.{student.name}"
        model = student.name.removeprefix(f"{student.method}.").removesuffix(f".s{student.seed}")
        if f"{student.method}.{model}.s{student.seed}" == student.name and not _is_listed(
            path, settings, student
        ):
            models += [] if model in models else [model]
            entries[student.name] = f"compare.models.{models.index(model)}"
    return entries


def _is_listed(path: Path, settings: Sequence[str], student: StudentConfig) -> bool:
    try:
        load_config(path, [*settings, f"students.{student.name}.name={student.name}"])
    except ConfigError:
        return False
    return True


def _table(plan: Plan) -> Table:
    table = Table(box=SIMPLE)
    for name in ("", "model", "ms/image", "threads", "share", "of it", "processes"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "model") else "right")
    for share in plan.shares:
        table.add_row(*_cells(share, plan))
    return table


def _cells(share: Share, plan: Plan) -> Iterator[str]:
    unit = UNITS[share.cost.device]
    yield share.name
    yield share.model
    yield f"{1000 * share.cost.seconds:.3f}"
    yield str(share.cost.num_threads)
    yield f"{share.amount:.2f} {unit}"
    yield f"{share.amount / plan.machine.room(share.cost.device):.0%}"
    yield f"{share.processes} x {share.reserved:g}"


def _lines(plan: Plan) -> Iterator[str]:
    if plan.views_per_image is not None:
        yield f"unique views: {plan.views_per_image:.3f} per image and epoch of the longest training"
    if plan.a_star is not None:
        yield f"A*: {plan.a_star:.2f}, the most that one shared teacher can gain over one inside each student's run"
    elif plan.placement is not None:
        yield "A*: none, the teacher's and the students' seconds are of different devices"
    together = "1 student" if plan.at_once == 1 else f"{plan.at_once} students in step"
    yield (
        f"speed at best: {plan.rate:,.0f} images/s per student, {together}, {plan.epoch_s:.2f} s per epoch of "
        f"{plan.num_rows:,} images"
    )
    yield "settings:"
    yield from (f"  --set {setting}" for setting in plan.settings)
