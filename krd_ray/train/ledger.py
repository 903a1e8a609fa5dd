"""Answers what a run cost and what sharing the teacher saved; every figure is counted by the process it is about.

Does not estimate: costs per sample come from the CPU clocks of the teacher and the students of this very run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from krd_ray.teacher.actor import read_stats
from krd_ray.train.rundir import RunDir, num_restarts, num_sessions

SUMMED = [
    "requests",
    "rows",
    "hits",
    "joined",
    "forwards",
    "unique_views",
    "forward_calls",
    "padded_rows",
    "bytes_in",
    "bytes_out",
    "busy_s",
    "cpu_s",
    "process_cpu_s",
    "idle_s",
]
STUDENT_SUMS = [
    "compute_s",
    "wait_targets_s",
    "wait_data_s",
    "cpu_s",
    "step_cpu_s",
    "requests",
    "retries",
    "bytes_received",
]


def build_ledger(
    run: RunDir,
    students: Sequence[str],
    *,
    taught: Sequence[str],
    driver_bytes: Mapping[str, int],
    on_cpu: bool,
) -> dict[str, Any]:
    """Adds up the run's metric rows and the teacher's statistics.

        alone = sum_i samples_i * (C_T + C_i)      N runs with the teacher inside each
        A  = alone / (teacher CPU seconds + sum_i student CPU seconds)
        A* = alone / (unique views * C_T + sum_i samples_i * C_i),   eta = A / A*

    C_T is the teacher's CPU time of a forward, C_i the CPU time of student i's training step, per sample; the
    denominator of A holds all CPU time of those processes while training, protocol and waiting loops included.
    With N students of as many samples and fresh views, A* = (N * C_T + sum C_i) / (C_T + sum C_i). CPU clocks say
    nothing about work on GPUs: A, A* and eta are null there.

    Args:
        run: the run directory.
        students: all names.
        taught: those that learn from the teacher.
        on_cpu: no process of the run had a GPU.
        driver_bytes: payload that the driver received, counted where it is unpickled.
    Returns:
        The content of ledger.json.
    """
    entries = {name: _student_entry(run, name) for name in students}
    teacher = _teacher_entry(run.teacher) if taught else None
    ledger: dict[str, Any] = {
        "students": entries,
        "teacher": teacher,
        "forwards_per_unique_view": None,
        "cost_unit": "CPU seconds",
        "cost_teacher_s_per_sample": None,
        "cost_student_s_per_sample": {
            name: entry["step_cpu_s"] / entry["samples"] if entry["samples"] else None
            for name, entry in entries.items()
        },
        "A": None,
        "A_star": None,
        "eta": None,
        "driver_bytes": dict(driver_bytes),
    }
    if teacher is not None and teacher["unique_views"]:
        ledger["forwards_per_unique_view"] = teacher["forwards"] / teacher["unique_views"]
        if on_cpu and teacher["forwards"] > 0 and all(entries[name]["samples"] for name in taught):
            ledger |= _gain(teacher, {name: entries[name] for name in taught})
    return ledger


def _gain(teacher: Mapping[str, Any], taught: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    cost_teacher = teacher["cpu_s"] / teacher["forwards"]
    costs = {name: entry["step_cpu_s"] / entry["samples"] for name, entry in taught.items()}
    alone = sum(entry["samples"] * (cost_teacher + costs[name]) for name, entry in taught.items())
    shared = teacher["process_cpu_s"] + sum(entry["cpu_s"] for entry in taught.values())
    trained = sum(entry["samples"] * costs[name] for name, entry in taught.items())
    best = alone / (teacher["unique_views"] * cost_teacher + trained)
    return {
        "cost_teacher_s_per_sample": cost_teacher,
        "A": alone / shared,
        "A_star": best,
        "eta": alone / shared / best,
    }


def _student_entry(run: RunDir, name: str) -> dict[str, Any]:
    """Sums over completed epochs; an epoch that was repeated after a restart counts as often as it was trained."""
    rows = run.student(name).rows()
    trained = [row for row in rows if row["split"] == "train"]
    covered = {row["epoch"]: row for row in rows if row["split"] == "coverage"}
    entry: dict[str, Any] = {"samples": sum(row["num_samples"] for row in trained)}
    entry |= {key: sum(row[key] for row in trained) for key in STUDENT_SUMS}
    entry["restarts"] = num_restarts(rows)
    entry["sessions"] = num_sessions(rows)
    entry["epochs"] = len(covered)
    entry |= {key: sum(row[key] for row in covered.values()) for key in ("missed", "doubled", "left_out")}
    return entry


def _teacher_entry(folder: Path) -> dict[str, Any]:
    rows = read_stats(folder)
    entry: dict[str, Any] = {key: sum(row[key] for row in rows) for key in SUMMED}
    replicas = {row["replica"] for row in rows}
    entry["replicas"] = len(replicas)
    entry["restarts"] = sum(row["restarted"] for row in rows)
    for key in ("store_memory_bytes", "store_disk_bytes", "queue_peak_rows", "calibration_forwards"):
        entry[key] = sum(max((r[key] for r in rows if r["replica"] == k), default=0) for k in replicas)
    return entry
