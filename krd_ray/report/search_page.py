"""Answers how a search directory becomes one page, its pictures and their numbers, and the table in a terminal.

Does not compute results (`search_tables`, `verdict`) and does not draw (`search_figures`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from krd_ray.atomic import write_bytes
from krd_ray.report import search_figures as figures
from krd_ray.report import search_tables as tables
from krd_ray.report.drawing import Draw
from krd_ray.report.formats import count, seconds
from krd_ray.report.palette import TRIAL_LOOKS
from krd_ray.report.read_run import Row
from krd_ray.report.read_search import SearchRecord, read_search
from krd_ray.report.search_text import (
    COLUMNS,
    best_line,
    cost_line,
    figure,
    objective,
    setting_lines,
)
from krd_ray.report.verdict import Difference, differences, sentence
from krd_ray.report.writing import Section, csv_bytes, render, write_picture


@dataclass(frozen=True)
class SearchFigure:
    """One picture of the page: its numbers, its drawing, what the reader is told, and why there may be none."""

    title: str
    caption: str
    rows: Callable[[SearchRecord], list[Row]]
    draw: Draw
    missing: str


def build_search_report(search_dir: Path) -> Path:
    """Write the report of one search: a page that stands alone, and beside it a PNG and a CSV of every picture.

    Args:
        search_dir: a search directory, ended or still being written.
    Returns:
        `search_dir/report/index.html`.
    Raises:
        RunError: `search_dir` is no search directory, or one of its files is not what the format promises.
    """
    search = read_search(search_dir)
    folder = search_dir / "report"
    folder.mkdir(exist_ok=True)
    sections = {key: _section(key, record, search, folder) for key, record in FIGURES.items()}
    page = folder / "index.html"
    write_bytes(page, _render(search, sections).encode("utf-8"))
    return page


def _section(key: str, record: SearchFigure, search: SearchRecord, folder: Path) -> Section:
    rows = record.rows(search)
    png_path, csv_path = folder / f"{key}.png", folder / f"{key}.csv"
    if not rows:
        png_path.unlink(missing_ok=True)
        csv_path.unlink(missing_ok=True)
        return Section(key, record.title, record.caption, csv_path.name, missing=record.missing)
    png = write_picture(png_path, record.draw, rows, {})
    write_bytes(csv_path, csv_bytes(rows))
    return Section(key, record.title, record.caption, csv_path.name, png)


def confirmed(search: SearchRecord) -> list[Difference]:
    """What the confirmation says, the searched metrics first; empty without one."""
    if search.confirmation is None:
        return []
    found = differences(search.confirmation)
    names = [metric.partition("/")[2] for metric in search.metrics]
    return sorted(found, key=lambda each: each.metric not in names)


def _render(search: SearchRecord, sections: dict[str, Section]) -> str:
    found = confirmed(search)
    names = [metric.partition("/")[2] for metric in search.metrics]
    return render(
        "search.html.j2",
        search=search,
        record=search.record,
        sections=sections,
        objective=objective(search),
        tiles=_tiles(search),
        best=best_line(search),
        settings=setting_lines(search),
        cost=cost_line(search),
        differences=found,
        verdicts=[sentence(each) for each in found if each.metric in names],
        confirm_missing=_why_not_confirmed(search),
        table=tables.trial_table(search),
        looks={kind: colour for kind, (colour, _) in TRIAL_LOOKS.items()},
        kind=lambda row: tables.kind_of(search, row),
        columns=list(dict.fromkeys([*COLUMNS, "val/balanced", *search.metrics])),
        reached=figure,
    )


def _tiles(search: SearchRecord) -> list[tuple[str, str, str]]:
    """Label, value, small print."""
    counts = search.record.get("counts") or {}
    best = search.record.get("best")
    tiles = [
        (
            "trials",
            str(sum(counts.values())),
            f"{counts.get('complete', 0)} complete, {counts.get('stopped', 0)} stopped early, "
            f"{counts.get('failed', 0)} failed",
        )
    ]
    if best:
        shown = " / ".join(figure(metric, value) for metric, value in best["values"].items())
        who = "the config as it stands" if best["baseline"] else f"trial {best['number']}"
        tiles.append((f"best {' / '.join(best['values'])}", shown, who))
    shared = (search.ledger or {}).get("search")
    if shared and shared["forwards_one_teacher_per_trial"]:
        saved = f"{count(shared['forwards_saved'])} fewer than one teacher per trial"
        tiles.append(("teacher forwards", f"{shared['forwards']:,}", saved))
    if shared:
        tiles.append(
            ("trial time", seconds(shared["trial_seconds"]), "training and waiting, all trials together")
        )
    return tiles


def _why_not_confirmed(search: SearchRecord) -> str:
    best = search.record.get("best")
    if best is None:
        return "No trial has completed yet."
    if best["baseline"]:
        return "The best trial is the config as it stands: there is nothing to compare it with."
    if not search.record["options"]["confirm_seeds"]:
        return (
            "Not asked for (--no-confirm): on one seed and the validation split alone, a gain may be chance."
        )
    return "Not finished yet: best and baseline are trained again when the trials have ended."


FIGURES: dict[str, SearchFigure] = {
    "history": SearchFigure(
        "What each trial reached",
        "Validation split, after a trial's last validated epoch; stopped trials stand where they were stopped.",
        tables.history_rows,
        figures.draw_history,
        "No trial has been validated yet.",
    ),
    "importance": SearchFigure(
        "Which parameters mattered",
        "Share of the difference between better and worse trials that a parameter explains (PED-ANOVA), over the "
        "ranges that were searched. With few trials this is a hint, not a measurement.",
        tables.importance_rows,
        figures.draw_importance,
        "At least four complete trials that differ are needed.",
    ),
    "slices": SearchFigure(
        "Each parameter on its own",
        "A point is one trial. All parameters vary together, so that a slope may belong to another one.",
        tables.slice_rows,
        figures.draw_slices,
        "No trial has been validated yet.",
    ),
    "front": SearchFigure(
        "Pareto front",
        "Complete trials; the line joins those that no other one beats in both metrics. Numbers are trials.",
        tables.front_rows,
        figures.draw_trade_off,
        "One metric was searched for: there is a best trial, not a front.",
    ),
    "tail_against_head": SearchFigure(
        "Tail against head",
        "Complete trials, validation accuracy of classes with fewer than 20 training images against that of classes "
        "with more than 100: what a setting wins on one side it may pay for on the other.",
        tables.tail_rows,
        figures.draw_trade_off,
        "No complete trial, or these shards lack many-shot or few-shot classes.",
    ),
    "forwards": SearchFigure(
        "What the teacher computed",
        "Counted by the teacher in this search, kills and resumes included; beside it what as many trials would need "
        "with a teacher and a store of their own each.",
        tables.cost_rows,
        figures.draw_forwards,
        "No ledger yet, or no trial that learned from a teacher.",
    ),
}
"""Key -> picture, in the order of the page."""
