"""Answers which figures a run's page has, where their numbers come from and what the reader is told.

Does not write files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from krd_ray.report import cost_figure, figures, sharing, sharing_figure, tables
from krd_ray.report.drawing import Draw
from krd_ray.report.read_run import Row, Run

MAX_BARS, MAX_LINES = 48, 10
"""Most students (or methods' means) that one figure shows as bars, and as lines of one panel."""


@dataclass(frozen=True)
class FigureRecord:
    """One figure of the page: where its numbers come from, how it is drawn, what the reader is told.

    `missing` says, in words for the reader, why there is no row to draw; `has_spread` tells that a spread over
    seeds is drawn; `most_bars` and `most_lines` bound what is drawn, in all and for each model; `adds` ends the
    caption with what the picture shows of this run.
    """

    title: str
    caption: str
    rows: Callable[[Run], list[Row]]
    draw: Draw
    missing: Callable[[Run], str]
    has_spread: bool = False
    most_bars: int | None = None
    most_lines: int | None = None
    adds: Callable[[Run], str] = lambda _: ""


def caption_of(record: FigureRecord, rows: list[Row]) -> str:
    """The caption of a figure of rows, which says so where rows are means over seeds."""
    if "num_seeds" not in rows[0]:
        return record.caption
    spread = "; a thin bar is one standard deviation to either side" if record.has_spread else ""
    return f"{record.caption} Each is the mean over seeds{spread}."


def limited(rows: list[Row], record: FigureRecord) -> tuple[list[Row], str]:
    """Keep what a figure can show readably, and say what was left out.

    Args:
        rows: of the figure, in the order of drawing.
        record: of the figure; `most_bars` is shared out evenly among the models, `most_lines` is each model's.
    Returns:
        The rows to draw, and a sentence for the reader, empty if all are drawn.
    """
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if "name" in row and row["role"] == "student":
            names[str(row["model"])][row["name"]] = None
    most = record.most_lines
    if record.most_bars is not None:
        most = max(1, record.most_bars // max(1, len(names)))
    kept = {name for own in names.values() for name in list(own)[:most]}
    total = sum(map(len, names.values()))
    if len(kept) == total:
        return rows, ""
    drawn = [row for row in rows if row["role"] == "teacher" or row["name"] in kept]
    return drawn, f" Drawn: {len(kept)} of {total}, the first of each model; the CSV holds all."


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
        has_spread=True,
        most_bars=MAX_BARS,
    ),
    "accuracy_by_class_count": FigureRecord(
        "Accuracy per class against its training images",
        "A faint point is one class (left out where there are many students); lines join the means of up to ten "
        "bins of about equally many classes. Vertical rules at 20 and 100 images. Left is the tail.",
        tables.class_rows,
        figures.draw_classes,
        _no_evaluation,
        most_lines=MAX_LINES,
    ),
    "accuracy_by_cost": FigureRecord(
        "Accuracy against cost",
        "Higher and further left is better: more accuracy for fewer parameters, or for less time of one image on "
        "one CPU thread. Students of one model cost the same and are shown together.",
        tables.cost_rows,
        cost_figure.draw_costs,
        _no_evaluation,
        has_spread=True,
    ),
    "curves": FigureRecord(
        "Training curves",
        "Training losses of different objectives sum different terms: compare shapes, not levels. Validation "
        "accuracy is balanced (each class weighs the same). After a restart, an epoch's last attempt counts.",
        tables.curve_rows,
        figures.draw_curves,
        _no_curves,
        most_lines=MAX_LINES,
    ),
    "sharing_bound": FigureRecord(
        "What sharing the teacher saved, and what it could save at most",
        "CPU seconds of as many runs with the teacher inside each (from this run's own costs), of this run, and of "
        "its forwards of unique views and its steps alone. What stands right of the dashed line is lost.",
        sharing.sharing_rows,
        sharing_figure.draw_sharing,
        sharing.why_no_bound,
        adds=sharing.bound_caption,
    ),
    "time_split": FigureRecord(
        "Where each student's time went",
        "Shares of the seconds that the ledger booked; the total stands at the right.",
        tables.time_rows,
        figures.draw_times,
        _no_ledger,
        most_bars=MAX_BARS,
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
