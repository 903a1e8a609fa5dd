"""Answers how a run directory becomes one page: numbers, figures and words put together and written.

Does not compute results (`tables`) and does not draw (`figures`).
"""

from __future__ import annotations

from pathlib import Path

from krd_ray.atomic import write_bytes
from krd_ray.report import tables
from krd_ray.report.comparison import Comparison, compare, csv_rows
from krd_ray.report.comparison_text import comparison_table, latency_note, notes
from krd_ray.report.palette import Palette, method_palette
from krd_ray.report.read_run import Row, Run, read_run
from krd_ray.report.sections import FIGURES, FigureRecord, caption_of, limited
from krd_ray.report.seeds import compares
from krd_ray.report.words import best_students, headline_tiles, ledger_facts, split_facts, val_note
from krd_ray.report.writing import Section, csv_bytes, render, write_picture


def build_report(run_dir: Path) -> Path:
    """Write the report of one run: a self-contained page, and beside it a PNG and a CSV of every figure.

    The page holds its own style and pictures, needs no script and no network, and may be mailed alone.
    Building it again replaces it; a figure whose numbers are gone loses its old files. A run that compares
    methods or seeds begins with their table, and its figures draw means over seeds.

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
    comparison = compare([run]) if compares(run) else None
    palette = method_palette(tables.method_order(run))
    sections = {key: _write_figure(key, record, run, palette, folder) for key, record in FIGURES.items()}
    write_bytes(folder / "headline.csv", csv_bytes(headline))
    if comparison is None:
        (folder / "comparison.csv").unlink(missing_ok=True)
    else:
        write_bytes(folder / "comparison.csv", csv_bytes(csv_rows(comparison.cells)))
    page = folder / "index.html"
    write_bytes(page, _render(run, headline, comparison, palette, sections).encode("utf-8"))
    return page


def _write_figure(key: str, record: FigureRecord, run: Run, palette: Palette, folder: Path) -> Section:
    rows = record.rows(run)
    png_path, csv_path = folder / f"{key}.png", folder / f"{key}.csv"
    if not rows:
        png_path.unlink(missing_ok=True)
        csv_path.unlink(missing_ok=True)
        return Section(key, record.title, record.caption, csv_path.name, missing=record.missing(run))
    drawn, note = limited(rows, record)
    png = write_picture(png_path, record.draw, drawn, palette)
    write_bytes(csv_path, csv_bytes(rows))
    return Section(key, record.title, caption_of(record, rows) + record.adds(run) + note, csv_path.name, png)


def _render(
    run: Run,
    headline: list[Row],
    comparison: Comparison | None,
    palette: Palette,
    sections: dict[str, Section],
) -> str:
    return render(
        "page.html.j2",
        run=run,
        seeds=tables.seeds(run),
        headline=headline,
        best=best_students(headline),
        columns=HEADLINE_COLUMNS,
        palette={name: colour for name, (colour, _) in palette.items()},
        comparison=comparison_table(comparison, costs=True) if comparison else None,
        comparison_notes=notes(comparison) if comparison else [],
        latency_note=latency_note([run]),
        timed=any(row["latency_ms"] is not None for row in headline),
        tiles=headline_tiles(run, headline, comparison),
        facts=ledger_facts(run),
        health=tables.health_rows(run),
        splits=split_facts(run),
        val_note=val_note(run),
        sections=sections,
    )


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
