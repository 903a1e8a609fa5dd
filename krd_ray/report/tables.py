"""Answers which numbers the report shows: every table and every figure as plain rows.

Does not draw, format or write: a figure draws exactly the rows that its CSV holds, the page formats them.
Accuracies and shares are fractions in 0..1 throughout; a number that is not known is `None`. In a run that
compares methods or seeds, the rows of a figure are means over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from krd_ray.report.read_run import Row, Run, Student, configured_students, last_rows
from krd_ray.report.seeds import compares, labels_of, mean_over_seeds, methods_of, model_of, seed_of

MANY_ABOVE = 100
"""A class with more training images than this is a many-shot class (Liu et al. 2019, arXiv:1904.05160)."""
FEW_BELOW = 20
"""A class with fewer training images than this is a few-shot class."""

GROUPS = ("many", "medium", "few")
ACCURACIES = ("top1", *GROUPS, "balanced", "worst_class", "harmonic_mean")
METRICS = (*ACCURACIES, "ece", "agreement")
TIMES = ("compute_s", "wait_targets_s", "wait_data_s")
COVERAGE = ("missed", "doubled", "left_out")


def group_of(class_count: int) -> str:
    """Name the group of a class by its number of training images: many (> 100), medium, few (< 20).

    Example:
        >>> [group_of(count) for count in (101, 100, 20, 19)]
        ['many', 'medium', 'medium', 'few']
    """
    if class_count > MANY_ABOVE:
        return "many"
    return "few" if class_count < FEW_BELOW else "medium"


def headline_rows(run: Run) -> list[Row]:
    """The table a reader looks at first: the teacher, then every student from small to large.

    Args:
        run: a run directory as `read_run` gives it.
    Returns:
        One row a model with `name, role, model, method, seed, loss_name, status, error, num_params, num_flops,
        latency_ms`, the test metrics (`top1, many, medium, few, balanced, worst_class, harmonic_mean, ece,
        agreement`, fractions), `images_per_s` and `wait_frac`. A student that failed or was never tested keeps
        its row. `method` is the loss's label, or what a comparison's settings call it.
    """
    models = run.evaluation["models"] if run.evaluation is not None else {}
    teachers = [_teacher_row(name, entry) for name, entry in models.items() if entry["role"] == "teacher"]
    if not teachers and run.config.get("teacher") is not None:
        teachers = [_teacher_row("teacher", {"model": run.config["teacher"].get("model")})]
    comparing = compares(run)
    methods = methods_of(run) if comparing else labels_of(run)
    rows = [_student_row(run, student, methods, models.get(student.name, {})) for student in run.students]
    if not comparing:
        return teachers + sorted(rows, key=_size_order)
    return teachers + in_comparison_order(rows, list(dict.fromkeys(methods.values())))


def in_comparison_order(rows: Sequence[Row], methods: Sequence[str | None]) -> list[Row]:
    """Sort rows by their model's size, then by method in the order given, then by seed."""
    sizes = {row["model"]: row["num_params"] for row in rows if row["num_params"]}
    return sorted(
        rows,
        key=lambda row: (
            sizes.get(row["model"], float("inf")),
            row["model"] or "",
            methods.index(row["method"]),
            row["seed"],
        ),
    )


def method_order(run: Run) -> list[str | None]:
    """The run's methods in the order of a legend: as the settings name them, losses alphabetically."""
    if compares(run):
        return list(dict.fromkeys(methods_of(run).values()))
    return sorted(set(labels_of(run).values()), key=lambda name: (name is None, name))


def group_rows(run: Run) -> list[Row]:
    """Accuracy by group: one row a model with `many, medium, few, overall` (overall = top-1)."""
    if run.evaluation is None:
        return []
    rows = [
        {**_identity(row), **{group: row[group] for group in GROUPS}, "overall": row["top1"]}
        for row in headline_rows(run)
    ]
    return mean_over_seeds(rows, (*GROUPS, "overall")) if compares(run) else rows


def class_rows(run: Run) -> list[Row]:
    """Accuracy per class: one row a model and class with `class, class_count, group, accuracy`."""
    if run.evaluation is None:
        return []
    counts = run.dataset["splits"]["train"]["class_counts"]
    rows: list[Row] = []
    for row in headline_rows(run):
        accuracies = run.evaluation["models"].get(row["name"], {}).get("per_class_accuracy")
        for name, count, accuracy in zip(run.dataset["classes"], counts, accuracies or [], strict=False):
            named = {"class": name, "class_count": count, "group": group_of(count), "accuracy": accuracy}
            rows.append({**_identity(row), **named})
    return mean_over_seeds(rows, ["accuracy"], along=["class"]) if compares(run) else rows


def curve_rows(run: Run) -> list[Row]:
    """Curves: one row a student and epoch with `train_loss, val_balanced, val_top1`.

    A mean over seeds is of students that finished, if any did, and ends where the first of them ends.
    """
    students = {student.name: student for student in run.students}
    curves: dict[tuple[Any, ...], list[list[Row]]] = defaultdict(list)
    rows = [row for row in headline_rows(run) if row["role"] == "student"]
    if not compares(run):
        return [{**_identity(row), **point} for row in rows for point in _curve(students[row["name"]])]
    ended = {(row["method"], row["model"]) for row in rows if row["status"] == "finished"}
    for row in rows:
        cell = (row["method"], row["model"])
        if row["status"] == "finished" or cell not in ended:
            curves[cell].append([{**_identity(row), **point} for point in _curve(students[row["name"]])])
    points = [point for members in curves.values() for own in zip(*members, strict=False) for point in own]
    return mean_over_seeds(points, ("train_loss", "val_balanced", "val_top1"), along=["epoch"])


def cost_rows(run: Run) -> list[Row]:
    """Accuracy against cost: one row a tested model of known size with `num_params, latency_ms, overall, few`."""
    rows = [
        {
            **_identity(row),
            "num_params": row["num_params"],
            "latency_ms": row["latency_ms"],
            "overall": row["top1"],
            "few": row["few"],
        }
        for row in headline_rows(run)
        if row["num_params"] and row["top1"] is not None
    ]
    return mean_over_seeds(rows, ("overall", "few")) if compares(run) else rows


def time_rows(run: Run) -> list[Row]:
    """Time split: one row a student with seconds `compute_s, wait_targets_s, wait_data_s` from the ledger."""
    if run.ledger is None:
        return []
    split = run.ledger["students"]
    rows = [
        {**_identity(row), **{key: split.get(row["name"], {}).get(key) for key in TIMES}}
        for row in headline_rows(run)
        if row["role"] == "student"
    ]
    return mean_over_seeds(rows, TIMES) if compares(run) else rows


def teacher_rows(run: Run) -> list[Row]:
    """Teacher's work: how many targets were served, where each came from, and what was unavoidable.

        served = hits + joined + forwards; every forward beyond `unique_views` was avoidable.

    hits were in the store, joined were being computed for another student at that moment.
    """
    teacher = run.ledger["teacher"] if run.ledger is not None else None
    if teacher is None:
        return []
    sources = [teacher.get(key) for key in ("hits", "joined", "forwards")]
    quantities = {
        "served": None if None in sources else sum(sources),
        **{key: teacher.get(key) for key in ("hits", "joined", "forwards", "unique_views")},
    }
    return [{"quantity": name, "targets": value} for name, value in quantities.items()]


def distribution_rows(run: Run) -> list[Row]:
    """Classes of the training split, most frequent first: `rank, class, class_count, group`."""
    counts = run.dataset["splits"]["train"]["class_counts"]
    order = sorted(range(len(counts)), key=lambda index: -counts[index])
    return [
        {
            "rank": rank,
            "class": run.dataset["classes"][index],
            "class_count": counts[index],
            "group": group_of(counts[index]),
        }
        for rank, index in enumerate(order)
    ]


def health_rows(run: Run) -> list[Row]:
    """What happened to each student: status, epochs, restarts, retries, delivery of samples, unread lines."""
    ledger = run.ledger["students"] if run.ledger is not None else {}
    students = {student.name: student for student in run.students}
    rows = []
    for row in headline_rows(run):
        if row["role"] != "student":
            continue
        student, account = students[row["name"]], ledger.get(row["name"], {})
        rows.append(
            {
                **_identity(row),
                "error": row["error"],
                "epochs_done": _epochs_done(student),
                "seconds": student.result.get("seconds"),
                "samples": account.get("samples"),
                "requests": account.get("requests"),
                "retries": account.get("retries"),
                "restarts": _first(student.result.get("restarts"), account.get("restarts")),
                "num_broken_lines": student.num_broken_lines,
                **_delivery(student),
            }
        )
    return rows


def seeds(run: Run) -> list[int]:
    """The seeds the run's students trained with, ascending and each once."""
    return sorted({seed_of(run, name) for name in configured_students(run.config) or [""]})


def binned_means(counts: Sequence[int], values: Sequence[float], num_bins: int) -> list[tuple[float, float]]:
    """Smooth a scatter for the eye: the mean of every bin of about equally many classes.

    Classes of one count are never split between bins, so a long flat tail is one point.

    Args:
        counts: [C] training images of each class, > 0.
        values: [C] what to average.
        num_bins: most points to return, >= 1.
    Returns:
        (geometric mean of the counts, mean of the values) of each bin, counts ascending.

    Example:
        >>> [(round(x, 6), y) for x, y in binned_means([1, 1, 4, 16], [0.0, 0.5, 0.5, 1.0], num_bins=2)]
        [(1.0, 0.25), (8.0, 0.75)]
    """
    if not counts:
        return []
    order = np.argsort(counts, kind="stable")
    x, y = np.asarray(counts, np.float64)[order], np.asarray(values, np.float64)[order]
    first_of_run = np.searchsorted(x, x)  # equal counts share the place of their first member
    bins = first_of_run * num_bins // len(x)
    return [(float(np.exp(np.log(x[bins == b]).mean())), float(y[bins == b].mean())) for b in np.unique(bins)]


def _teacher_row(name: str, entry: Row) -> Row:
    metrics = entry.get("metrics", {})
    return {
        "name": name,
        "role": "teacher",
        "model": entry.get("model"),
        "method": None,
        "seed": None,
        "loss_name": None,
        "status": "tested" if metrics else "not tested",
        "error": None,
        "num_params": entry.get("num_params"),
        "num_flops": entry.get("num_flops"),
        "latency_ms": entry.get("latency_ms"),
        **{key: metrics.get(key) for key in METRICS},
        "images_per_s": None,
        "wait_frac": None,
    }


def _student_row(run: Run, student: Student, methods: dict[str, str | None], entry: Row) -> Row:
    result, metrics = student.result, entry.get("metrics", {})
    return {
        "name": student.name,
        "role": "student",
        "model": model_of(run, student.name),
        "method": methods[student.name],
        "seed": seed_of(run, student.name),
        "loss_name": _first(result.get("loss_name"), entry.get("loss_name")),
        "status": student.status,
        "error": result.get("error"),
        "num_params": _first(result.get("num_params"), entry.get("num_params")),
        "num_flops": _first(result.get("num_flops"), entry.get("num_flops")),
        "latency_ms": entry.get("latency_ms"),
        **{key: metrics.get(key) for key in METRICS},
        "images_per_s": _first(result.get("images_per_s"), _last(student, "images_per_s")),
        "wait_frac": result.get("wait_frac"),
    }


def _identity(row: Row) -> Row:
    return {key: row[key] for key in ("name", "role", "model", "method", "seed", "loss_name", "status")}


def _size_order(row: Row) -> tuple[float, str, str, str]:
    return (row["num_params"] or float("inf"), row["model"] or "", row["loss_name"] or "", row["name"])


def _curve(student: Student) -> list[Row]:
    points: dict[int, Row] = defaultdict(lambda: {"train_loss": None, "val_balanced": None, "val_top1": None})
    for row in last_rows(student.rows, "train"):
        points[row["epoch"]]["train_loss"] = row.get("loss")
    for row in last_rows(student.rows, "val"):
        points[row["epoch"]] |= {"val_balanced": row.get("balanced"), "val_top1": row.get("top1")}
    return [{"epoch": epoch, **points[epoch]} for epoch in sorted(points)]


def _delivery(student: Student) -> Row:
    """Sum over epochs what the coverage rows say; `None` when no epoch was accounted for."""
    rows = last_rows(student.rows, "coverage")
    return {key: sum(row.get(key) or 0 for row in rows) if rows else None for key in COVERAGE}


def _epochs_done(student: Student) -> int:
    done = student.result.get("epochs_done")
    return int(done) if done is not None else len(last_rows(student.rows, "train"))


def _last(student: Student, key: str) -> Any:
    rows = last_rows(student.rows, "train")
    return rows[-1].get(key) if rows else None


def _first(*values: Any) -> Any:
    """The first value that is known."""
    return next((value for value in values if value is not None), None)
