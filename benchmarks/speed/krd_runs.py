"""Answers what a cell costs in krd_ray: one whole run, its CPU seconds by epoch, its ledger.

Does not count by itself: the run's own metric rows and the teacher's statistics say everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from benchmarks.speed.cells import COOL_DOWN_EPOCHS, WARM_UP_EPOCHS, Cell
from benchmarks.speed.others import others_cpu
from benchmarks.speed.setting import run_config
from krd_ray.errors import RunError
from krd_ray.train.fill import fill_targets
from krd_ray.train.run import start_run
from krd_ray.train.rundir import RunDir, read_json


def krd_run(root: Path, name: str, cell: Cell, **changes: Any) -> dict[str, Any]:
    """Runs a cell and returns CPU seconds per epoch, images/s per student over the same epochs, and the ledger."""
    config = run_config(root, name, cell, **changes)
    if cell.placement == "stored":
        fill_targets(config, print)
    with others_cpu() as others:
        outcome = start_run(config)
    if outcome.failed:
        raise RunError(f"{name}: {outcome.failed[0]['student']}: {outcome.failed[0]['error']}")
    run = outcome.run
    rows = {student.name: _train_rows(run, student.name) for student in config.students}
    teacher = _teacher_cpu(run.teacher)
    epochs = []
    for epoch in range(WARM_UP_EPOCHS, cell.epochs - COOL_DOWN_EPOCHS):
        whole = [each for each in rows.values() if len(each) == cell.epochs]
        ends = [max(each[e]["time"] for each in whole) for e in (epoch - 1, epoch)]
        served = _at(teacher, ends[1]) - _at(teacher, ends[0])
        trained = sum(each[epoch]["cpu_s"] for each in whole)
        besides = _at(others, ends[1]) - _at(others, ends[0])
        epochs.append(
            {
                "cpu_s": served + trained,
                "teacher_cpu_s": served,
                "others_cpu_s": besides,
                "wall_s": ends[1] - ends[0],
            }
        )
    images_per_s = {
        student: harmonic_mean(row["images_per_s"] for row in each[WARM_UP_EPOCHS:-COOL_DOWN_EPOCHS])
        for student, each in rows.items()
    }
    return {"epochs": epochs, "images_per_s": images_per_s, "ledger": read_json(run.ledger)}


def _train_rows(run: RunDir, student: str) -> list[dict[str, Any]]:
    return sorted(
        (row for row in run.student(student).rows() if row["split"] == "train"), key=lambda r: r["epoch"]
    )


def _teacher_cpu(folder: Path) -> list[tuple[float, float]]:
    """(time, CPU seconds of the process so far) of a served teacher, oldest first."""
    lines = [line for path in folder.glob("stats-*.jsonl") for line in path.read_text().splitlines()]
    return sorted((row["time"], row["process_cpu_s"]) for row in map(json.loads, lines))


def _at(curve: list[tuple[float, float]], when: float) -> float:
    """The value at a time, linear between two lines."""
    before = max((point for point in curve if point[0] <= when), default=None)
    after = min((point for point in curve if point[0] > when), default=None)
    if before is None or after is None:
        return (before or after or (0.0, 0.0))[1]
    part = (when - before[0]) / (after[0] - before[0])
    return before[1] + part * (after[1] - before[1])
