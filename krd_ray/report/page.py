"""Answers how a run directory becomes one page: numbers, figures and words put together and written.

Does not compute results (`tables`) and does not draw (`figures`).
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from krd_ray.report import figures, tables
from krd_ray.report.figures import Draw
from krd_ray.report.formats import NO_VALUE, byte_size, count, number, percent, seconds, times
from krd_ray.report.palette import Palette, loss_palette
from krd_ray.report.read_run import Run, read_run
from krd_ray.report.tables import Row


@dataclass(frozen=True)
class FigureRecord:
    """One figure of the page: where its numbers come from, how it is drawn, what the reader is told.

    `missing` says, in words for the reader, why there is no row to draw.
    """

    title: str
    caption: str
    rows: Callable[[Run], list[Row]]
    draw: Draw
    missing: Callable[[Run], str]


@dataclass(frozen=True)
class Section:
    """One figure as the template needs it; `png` is base64, empty when `missing` says why."""

    key: str
    title: str
    caption: str
    png: str
    missing: str


def build_report(run_dir: Path) -> Path:
    """Write the report of one run: a self-contained page, and beside it a PNG and a CSV of every figure.

    The page holds its own style and pictures, needs no script and no network, and may be mailed alone.
    Building it again replaces it; a figure whose numbers are gone loses its old files.

    Args:
        run_dir: a run directory, finished or still being written.
    Returns:
        `run_dir/report/index.html`.
    Raises:
        RunError: `run_dir` is no run directory, or one of its files is not what the format promises.
    """
    run = read_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    headline = tables.headline_rows(run)
    palette = loss_palette(row["loss_name"] for row in headline if row["role"] == "student")
    sections = {key: _write_figure(key, record, run, palette, folder) for key, record in FIGURES.items()}
    _write(folder / "headline.csv", _csv_bytes(headline))
    page = folder / "index.html"
    _write(page, _render(run, headline, palette, sections).encode("utf-8"))
    return page


def _write_figure(key: str, record: FigureRecord, run: Run, palette: Palette, folder: Path) -> Section:
    rows = record.rows(run)
    png_path, csv_path = folder / f"{key}.png", folder / f"{key}.csv"
    if not rows:
        png_path.unlink(missing_ok=True)
        csv_path.unlink(missing_ok=True)
        return Section(key, record.title, record.caption, "", record.missing(run))
    png = figures.render_png(record.draw, rows, palette)
    _write(png_path, png)
    _write(csv_path, _csv_bytes(rows))
    return Section(key, record.title, record.caption, base64.b64encode(png).decode("ascii"), "")


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old page or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _csv_bytes(rows: Sequence[Row]) -> bytes:
    """Encode rows as CSV; floats keep every digit, an unknown value is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def _render(run: Run, headline: list[Row], palette: Palette, sections: dict[str, Section]) -> str:
    source = resources.files("krd_ray.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "count": count, "number": number, "seconds": seconds}
    return environment.from_string(source).render(
        run=run,
        seeds=tables.seeds(run),
        headline=headline,
        best=best_students(headline),
        columns=HEADLINE_COLUMNS,
        palette={name: colour for name, (colour, _) in palette.items()},
        tiles=headline_tiles(run, headline),
        facts=ledger_facts(run),
        health=tables.health_rows(run),
        splits=split_facts(run),
        val_note=_val_note(run),
        sections=sections,
    )


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


def headline_tiles(run: Run, headline: list[Row]) -> list[tuple[str, str, str]]:
    """The four numbers at the top of the page as (label, value, small print)."""
    tested = [row for row in headline if row["role"] == "student" and row["balanced"] is not None]
    best = max(tested, key=lambda row: row["balanced"], default=None)
    teacher = next((row for row in headline if row["role"] == "teacher"), None)
    students = [row for row in headline if row["role"] == "student"]
    num_finished = sum(row["status"] == "finished" for row in students)
    not_finished = [f"{row['name']}: {row['status']}" for row in students if row["status"] != "finished"]
    ledger = run.ledger or {}
    return [
        (
            "best student, balanced accuracy",
            percent(best["balanced"]) + " %" if best else NO_VALUE,
            best["name"] if best else "no student tested yet",
        ),
        (
            "teacher, balanced accuracy",
            percent(teacher["balanced"]) + " %" if teacher and teacher["balanced"] is not None else NO_VALUE,
            teacher["model"] or "not tested" if teacher else "no teacher in this run",
        ),
        (
            "students finished",
            f"{num_finished} of {len(students)}",
            ", ".join(not_finished) or "none failed",
        ),
        (
            "teacher forwards per unique view",
            number(ledger.get("forwards_per_unique_view"), 3),
            "ideal 1.000",
        ),
    ]


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
        ("Padded rows", count(teacher.get("padded_rows")), "forwarded only to keep the batch shape"),
        ("Teacher restarts", count(teacher.get("restarts")), f"{count(teacher.get('replicas'))} replicas"),
    ]


def split_facts(run: Run) -> list[tuple[str, str]]:
    """Each split with its number of images, or that it is not there."""
    splits = run.dataset["splits"]
    sizes = {name: (splits.get(name) or {}).get("num_rows") for name in ("train", "val", "test")}
    return [(name, f"{size:,} images" if size else "none") for name, size in sizes.items()]


def _val_note(run: Run) -> str:
    """Say so where a run has no validation accuracy to draw."""
    if not (run.dataset["splits"].get("val") or {}).get("num_rows"):
        return "This data set has no val split, so there is no validation curve."
    if all(row["split"] != "val" for student in run.students for row in student.rows):
        return "No validation row has been written yet, so there is no validation curve."
    return ""


def _no_evaluation(run: Run) -> str:
    if run.evaluation is None:
        return "No evaluation yet: evaluation.json is written when the run has ended, unless evaluate: false."
    return "The evaluation holds no such numbers for any model."


def _no_curves(run: Run) -> str:
    return "No epoch has been completed yet." if run.students else "No student has started yet."


def _no_ledger(run: Run) -> str:
    return (
        "No ledger yet: ledger.json is written when the run has ended."
        if run.ledger is None
        else "The ledger names no student."
    )


def _no_teacher(run: Run) -> str:
    if run.ledger is None:
        return _no_ledger(run)
    return "No teacher in this run (teacher: null), so no targets were served."


FIGURES: dict[str, FigureRecord] = {
    "accuracy_by_group": FigureRecord(
        "Accuracy by group",
        "Classes grouped by training images: many-shot above 100, few-shot below 20. Students of one model "
        "stand together, smallest first; the dashed line is the teacher.",
        tables.group_rows,
        figures.draw_groups,
        _no_evaluation,
    ),
    "accuracy_by_class_count": FigureRecord(
        "Accuracy per class against its training images",
        "A faint point is one class; lines join the means of up to ten bins of about equally many classes. "
        "Vertical rules at 20 and 100 images. Left is the tail.",
        tables.class_rows,
        figures.draw_classes,
        _no_evaluation,
    ),
    "accuracy_by_params": FigureRecord(
        "Accuracy against size",
        "Higher and further left is better: more accuracy for fewer parameters. "
        "A stem joins the students of one model.",
        tables.params_rows,
        figures.draw_params,
        _no_evaluation,
    ),
    "curves": FigureRecord(
        "Training curves",
        "Training losses of different objectives sum different terms: compare shapes, not levels. Validation "
        "accuracy is balanced (each class weighs the same). After a restart, an epoch's last attempt counts.",
        tables.curve_rows,
        figures.draw_curves,
        _no_curves,
    ),
    "time_split": FigureRecord(
        "Where each student's time went",
        "Shares of the seconds that the ledger booked; the total stands at the right.",
        tables.time_rows,
        figures.draw_times,
        _no_ledger,
    ),
    "teacher_work": FigureRecord(
        "What the teacher served, and what it cost",
        "Targets served = found in the store + being computed for another student at that moment + forwards. "
        "Forwards beyond the unique views were avoidable.",
        tables.teacher_rows,
        figures.draw_teacher,
        _no_teacher,
    ),
    "class_distribution": FigureRecord(
        "Classes of the training split",
        "Each bar is one class.",
        tables.distribution_rows,
        figures.draw_distribution,
        lambda run: f"{run.path / 'dataset.json'} lists no class.",
    ),
}

HEADLINE_COLUMNS: dict[str, str] = {
    "top1": "top\N{NON-BREAKING HYPHEN}1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced": "balanced",
    "worst_class": "worst class",
    "harmonic_mean": "harmonic mean",
    "ece": "ECE",
    "agreement": "agrees with teacher",
}
"""Metric columns of the headline table, in order: key of `tables.headline_rows` -> heading."""
