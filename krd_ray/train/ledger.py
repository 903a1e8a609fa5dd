"""Answers what a run cost and what sharing the teacher saved; every figure is counted by the process it is about.

Does not estimate: costs per sample come from the CPU clocks of the teacher and the students of this very run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import linear_regression
from typing import Any

from krd_ray.teacher.stats import read_stats
from krd_ray.train.bound import NOT_KNOWN, bound_of
from krd_ray.train.rundir import RunDir, num_restarts, num_sessions

Row = dict[str, Any]

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
MIN_EPOCHS_OF_SLOPE = 4


def build_ledger(
    run: RunDir,
    students: Sequence[str],
    *,
    taught: Sequence[str],
    driver_bytes: Mapping[str, int],
    on_cpu: bool,
) -> dict[str, Any]:
    """Adds up the run's metric rows and the teacher's statistics.

        forwards_per_unique_view = forwards / unique views, ideal 1
        marginal_cost_i = S_i / step_i, ideal 1       all CPU seconds of student i's processes over those of its steps

    `bound.bound_of` gives A, A*, eta and where eta was lost. CPU clocks say nothing about work on GPUs: all these
    ratios of CPU seconds are null there, and without a single forward (a store that was full before), A, A* and eta.

    Memory is what the largest process holds for itself, without pages that it shares (`stats.process_memory`).
    `private_bytes_peak` is taken at the ends of a student's epochs, and after each of the teacher's forwards (null
    where it works inside the students). `private_bytes_per_epoch` is the least-squares slope over the epochs after
    the first, within the attempt that has most; null with fewer than 4.

    Args:
        run: the run directory.
        students: all names.
        taught: those that learn from the teacher.
        on_cpu: no process of the run had a GPU.
        driver_bytes: payload that the driver received, counted where it is unpickled.
    Returns:
        The content of ledger.json.
    """
    stats = read_stats(run.teacher) if taught else []
    entries = {name: _student_entry(run, name, stats, on_cpu=on_cpu) for name in students}
    teacher = _teacher_entry(stats) if taught else None
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
        **NOT_KNOWN,
        "driver_bytes": dict(driver_bytes),
    }
    if teacher is not None and teacher["unique_views"]:
        ledger["forwards_per_unique_view"] = teacher["forwards"] / teacher["unique_views"]
        if on_cpu and teacher["forwards"] > 0 and all(entries[name]["samples"] for name in taught):
            ledger |= bound_of(teacher, {name: entries[name] for name in taught})
    return ledger


def _student_entry(run: RunDir, name: str, stats: Sequence[Row], *, on_cpu: bool) -> dict[str, Any]:
    """Sums over completed epochs; an epoch that was repeated after a restart counts as often as it was trained."""
    rows = run.student(name).rows()
    trained = [row for row in rows if row["split"] == "train"]
    covered = {row["epoch"]: row for row in rows if row["split"] == "coverage"}
    entry: dict[str, Any] = {"samples": sum(row["num_samples"] for row in trained)}
    entry |= {key: sum(row[key] for row in trained) for key in STUDENT_SUMS}
    shares = _shares_of(name, rows)
    entry["teacher_cpu_s"] = sum(row["cpu_s"] * shares.get(_host_of(row), 0.0) for row in stats)
    timed = on_cpu and entry["step_cpu_s"] > 0
    entry["marginal_cost"] = entry["cpu_s"] / entry["step_cpu_s"] if timed else None
    entry["restarts"] = num_restarts(rows)
    entry["sessions"] = num_sessions(rows)
    entry["epochs"] = len(covered)
    entry |= {key: sum(row[key] for row in covered.values()) for key in ("missed", "doubled", "left_out")}
    return entry | _memory(trained)


def _shares_of(name: str, rows: Sequence[Row]) -> dict[str | None, float]:
    """Part of the CPU seconds of a teacher inside a process that counts for one of its students, by its host."""
    processes = [row.get("process", [name]) for row in rows if row["split"] == "start"]
    return {name: 1.0, **{process[0]: 1 / len(process) for process in processes}}


def _memory(trained: Sequence[Row]) -> dict[str, float | None]:
    """Peak and growth; rows of a version that did not measure are left out."""
    attempts: dict[int, list[Row]] = {}
    for row in trained:
        if "private_bytes" in row:
            attempts.setdefault(row["attempt"], []).append(row)
    longest = max(attempts.values(), key=len, default=[])
    slope = None
    if len(longest) >= MIN_EPOCHS_OF_SLOPE:
        epochs, held = zip(*((row["epoch"], row["private_bytes"]) for row in longest[1:]), strict=True)
        slope = linear_regression(epochs, held).slope
    peaks = (row["private_bytes"] for rows in attempts.values() for row in rows)
    return {"private_bytes_peak": max(peaks, default=None), "private_bytes_per_epoch": slope}


def _teacher_entry(stats: Sequence[Row]) -> dict[str, Any]:
    """Sums over incarnations; one that worked inside a student has no process of its own."""
    entry: dict[str, Any] = {key: sum(row[key] for row in stats) for key in SUMMED}
    apart = [row for row in stats if _host_of(row) is None]
    inside = [row for row in stats if _host_of(row) is not None]
    entry["unique_views"] = sum(row["unique_views"] for row in apart) + _views_inside(inside)
    entry["process_cpu_s"] = sum(row["process_cpu_s"] for row in apart)
    entry["protocol_cpu_s"] = entry["process_cpu_s"] - sum(row["cpu_s"] for row in apart)
    replicas = {row["replica"] for row in stats}
    serving = inside or apart  # with teachers inside students, the actor that calibrated serves nobody
    entry["replicas"] = len({row["replica"] for row in serving})
    entry["restarts"] = sum(row["restarted"] for row in stats)
    for key in ("store_memory_bytes", "store_disk_bytes", "queue_peak_rows", "calibration_forwards"):
        entry[key] = sum(max((r[key] for r in stats if r["replica"] == k), default=0) for k in replicas)
    peaks = [] if inside else [row["private_bytes_peak"] for row in apart if "private_bytes_peak" in row]
    entry["private_bytes_peak"] = max(peaks, default=None)
    return entry


def _views_inside(inside: Sequence[Row]) -> int:
    """Views that differ, of teachers inside students: what each student's own has computed, others compute again.

    A view is the same for all students, so the run needed as many as the student with most: exact where no student
    has seen one that this one has not, else a lower bound. Workers of one student share its samples out between them.
    """
    views: dict[str | None, int] = {}
    for row in inside:
        views[_host_of(row)] = views.get(_host_of(row), 0) + row["unique_views"]
    return max(views.values(), default=0)


def _host_of(row: Row) -> str | None:
    """The first student of the worker that a replica lived in, called `<student>.<rank>`; None: its own process."""
    name = row["replica"]
    return name.rpartition(".")[0] if isinstance(name, str) else None
