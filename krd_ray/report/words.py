"""Answers what the page says besides tables and figures: tiles, facts of the ledger, what is best.

Does not lay anything out.
"""

from __future__ import annotations

from krd_ray.report import tables
from krd_ray.report.comparison import Comparison
from krd_ray.report.formats import NO_VALUE, byte_size, count, number, percent, percent_with_spread, times
from krd_ray.report.read_run import Row, Run
from krd_ray.report.sharing import dearest_student, growth, largest_student, losses


def best_students(headline: list[Row]) -> dict[str, float]:
    """Return the best value among the students for each accuracy (the highest) and ECE (the lowest).

    With a single tested student nothing is best, and the mapping is empty.

    Example:
        >>> rows = [{"role": "student", "top1": value, "ece": value} for value in (0.4, 0.5)]
        >>> best_students(rows)
        {'top1': 0.5, 'ece': 0.4}
    """
    best: dict[str, float] = {}
    for key in (*tables.ACCURACIES, "ece"):
        values = [row[key] for row in headline if row["role"] == "student" and row.get(key) is not None]
        if len(values) > 1:
            best[key] = min(values) if key == "ece" else max(values)
    return best


def headline_tiles(
    run: Run, headline: list[Row], comparison: Comparison | None
) -> list[tuple[str, str, str]]:
    """The four numbers at the top of the page as (label, value, small print)."""
    teacher = next((row for row in headline if row["role"] == "teacher"), None)
    students = [row for row in headline if row["role"] == "student"]
    num_finished = sum(row["status"] == "finished" for row in students)
    not_finished = [f"{row['name']}: {row['status']}" for row in students if row["status"] != "finished"]
    ledger = run.ledger or {}
    return [
        _best_tile(headline, comparison),
        (
            "teacher, balanced accuracy",
            percent(teacher["balanced"]) + " %" if teacher and teacher["balanced"] is not None else NO_VALUE,
            teacher["model"] or "not tested" if teacher else "no teacher in this run",
        ),
        (
            "students finished",
            f"{num_finished} of {len(students)}",
            _listed(not_finished) or "none failed",
        ),
        (
            "teacher forwards per unique view",
            number(ledger.get("forwards_per_unique_view"), 3),
            "ideal 1.000",
        ),
    ]


def _best_tile(headline: list[Row], comparison: Comparison | None) -> tuple[str, str, str]:
    rows = headline if comparison is None else comparison.cells
    tested = [row for row in rows if row["role"] == "student" and row["balanced"] is not None]
    best = max(tested, key=lambda row: row["balanced"], default=None)
    label = "best student, balanced accuracy" if comparison is None else "best mean, balanced accuracy"
    if best is None:
        return label, NO_VALUE, "no student tested yet"
    if comparison is None:
        return label, percent(best["balanced"]) + " %", best["name"]
    value = percent_with_spread(best["balanced"], best["balanced_std"])
    seeds = f"{best['num_seeds']} seed{'' if best['num_seeds'] == 1 else 's'}"
    return label, f"{value} %", f"{best['method']}, {best['model']}, {seeds}"


def _listed(names: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


def ledger_facts(run: Run) -> list[tuple[str, str, str]]:
    """The ledger's single numbers as (name, value, what it means); empty without a ledger."""
    if run.ledger is None:
        return []
    ledger, driver = run.ledger, run.ledger.get("driver_bytes") or {}
    teacher = ledger["teacher"] or {}
    busy, idle = teacher.get("busy_s"), teacher.get("idle_s")
    share = busy / (busy + idle) if busy is not None and idle is not None and busy + idle > 0 else None
    cost = ledger.get("cost_teacher_s_per_sample")
    unit, bound = ledger.get("cost_unit", "seconds"), ledger.get("A_star")
    alone = bound is not None and bound <= 1.0
    shared = "one student cannot gain by sharing" if alone else "share of the possible gain"
    return [
        ("Forwards per unique view", number(ledger.get("forwards_per_unique_view"), 3), "ideal 1.000"),
        (
            "A",
            times(ledger.get("A")),
            f"N runs with a teacher inside each, from this run's own costs, over what this run took, {unit}",
        ),
        ("A*", times(bound), "the bound: (N·C_T + ΣC_i) / (C_T + ΣC_i)"),
        ("η = A / A*", number(ledger.get("eta"), 3), shared),
        *_loss_facts(ledger),
        ("Driver bytes, pixels", byte_size(driver.get("pixels")), "ideal 0"),
        ("Driver bytes, targets", byte_size(driver.get("targets")), "ideal 0"),
        ("Teacher busy", percent(share) + " %" if share is not None else NO_VALUE, "of its replicas' time"),
        (
            "Cost of a forward",
            number(1e3 * cost, 3) + " ms" if cost is not None else NO_VALUE,
            f"per sample, C_T, {unit}",
        ),
        (
            "Bytes in / out",
            f"{byte_size(teacher.get('bytes_in'))} / {byte_size(teacher.get('bytes_out'))}",
            "teacher",
        ),
        (
            "Target store",
            f"{byte_size(teacher.get('store_memory_bytes'))} + {byte_size(teacher.get('store_disk_bytes'))}",
            "memory + disk",
        ),
        *_memory_facts(ledger),
        ("Padded rows", count(teacher.get("padded_rows")), "forwarded only to keep the batch shape"),
        ("Teacher restarts", count(teacher.get("restarts")), f"{count(teacher.get('replicas'))} replicas"),
    ]


def _loss_facts(ledger: Row) -> list[tuple[str, str, str]]:
    """Where eta was lost and what the next student costs; nothing where the ledger does not know."""
    facts = []
    parts, dearest = losses(ledger), dearest_student(ledger)
    if parts:
        where, share = parts[0]
        facts.append(("Largest loss of η", number(max(share, 0.0), 3), where))
    if dearest is not None:
        name, cost = dearest
        facts.append(
            ("Cost of the next student", times(cost), f"of its steps alone ({name}, the dearest); ideal 1.00")
        )
    return facts


def _memory_facts(ledger: Row) -> list[tuple[str, str, str]]:
    """Memory that processes hold for themselves; nothing where it was not recorded."""
    facts = []
    teacher, student = (ledger["teacher"] or {}).get("private_bytes_peak"), largest_student(ledger)
    if teacher is not None:
        facts.append(("Memory of the teacher", byte_size(teacher), "its largest replica, shared pages aside"))
    if student is not None:
        name, entry = student
        slope = growth(entry.get("private_bytes_per_epoch"))
        facts.append(
            ("Memory of the largest student", byte_size(entry["private_bytes_peak"]), f"{name}; {slope}")
        )
    return facts


def split_facts(run: Run) -> list[tuple[str, str]]:
    """Each split with its number of images, or that it is not there."""
    splits = run.dataset["splits"]
    sizes = {name: (splits.get(name) or {}).get("num_rows") for name in ("train", "val", "test")}
    return [(name, f"{size:,} images" if size else "none") for name, size in sizes.items()]


def val_note(run: Run) -> str:
    """Say so where a run has no validation accuracy to draw."""
    if not (run.dataset["splits"].get("val") or {}).get("num_rows"):
        return "This data set has no val split, so there is no validation curve."
    if all(row["split"] != "val" for student in run.students for row in student.rows):
        return "No validation row has been written yet, so there is no validation curve."
    return ""
