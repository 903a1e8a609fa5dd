"""Answers what `krd compare` writes: tables, pictures and a page about one or several runs.

Does not compute (`comparison`) and does not draw (`figures`, `cost_figure`, `comparison_figures`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from krd_ray.atomic import write_bytes
from krd_ray.report.comparison import Comparison, csv_rows, figure_rows, imbalance_rows
from krd_ray.report.comparison_figures import draw_imbalance
from krd_ray.report.comparison_text import (
    TextTable,
    as_markdown,
    comparison_table,
    latency_note,
    notes,
    paired_note,
    paired_table,
)
from krd_ray.report.drawing import Draw
from krd_ray.report.palette import Palette, method_palette
from krd_ray.report.read_run import Row
from krd_ray.report.sections import FIGURES, caption_of, limited
from krd_ray.report.writing import Section, csv_bytes, render, write_picture

CSV = "comparison.csv"


@dataclass(frozen=True)
class Picture:
    """One picture of the page: its file's name, what it shows, its rows."""

    key: str
    title: str
    caption: str
    draw: Draw
    rows: list[Row]


@dataclass(frozen=True)
class Block:
    """What the page says about one data set."""

    label: str
    key: str
    table: TextTable
    sections: list[Section]


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write a comparison into a folder: CSV, Markdown, pictures and a page that holds them all.

    Args:
        comparison: from `compare_runs`.
        out: folder, made if missing; what an earlier comparison wrote there is replaced.
    Returns:
        The files: comparison.csv (a row a data set, method and model), students.csv (a row a student),
        comparison.md, the pictures, index.html.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("accuracy_by_*.png"):
        old.unlink()
    palette = method_palette(comparison.methods)
    files = {
        out / CSV: csv_bytes(csv_rows(comparison.cells)),
        out / "students.csv": csv_bytes(
            [{**row, "run": Path(row["run"]).name} for row in comparison.students]
        ),
        out / "comparison.md": as_markdown(comparison).encode("utf-8"),
    }
    for path, content in files.items():
        write_bytes(path, content)
    overview = [_write_picture(picture, palette, out) for picture in _over_ratios(comparison)]
    labels = dict.fromkeys(cell["dataset"] for cell in comparison.cells)
    blocks = [_block(comparison, label, palette, out) for label in labels]
    page = out / "index.html"
    write_bytes(page, _render(comparison, palette, overview, blocks).encode("utf-8"))
    drawn = [*overview, *(section for block in blocks for section in block.sections)]
    return [*files, *(out / f"{section.key}.png" for section in drawn), page]


def _over_ratios(comparison: Comparison) -> list[Picture]:
    rows = imbalance_rows(comparison)
    return [
        Picture(
            f"accuracy_by_imbalance_{_slug(name)}",
            f"{name}: accuracy against the imbalance ratio",
            "Dashed: the teacher. Methods stand a little apart sideways. Each is the mean over seeds; a thin bar is "
            "one standard deviation to either side.",
            draw_imbalance,
            [row for row in rows if row["dataset_name"] == name],
        )
        for name in dict.fromkeys(row["dataset_name"] for row in rows)
    ]


def _block(comparison: Comparison, label: str, palette: Palette, out: Path) -> Block:
    own = replace(comparison, cells=[cell for cell in comparison.cells if cell["dataset"] == label])
    cells = figure_rows(own.cells)
    pictures = [_picture("accuracy_by_group", label, cells)]
    costly = [cell for cell in cells if cell["num_params"] and cell["overall"] is not None]
    if costly:
        pictures.append(_picture("accuracy_by_cost", label, costly))
    sections = [_write_picture(picture, palette, out) for picture in pictures]
    return Block(label, _slug(label), comparison_table(own, costs=True), sections)


def _picture(key: str, label: str, rows: list[Row]) -> Picture:
    record = FIGURES[key]
    drawn, note = limited(rows, record)
    return Picture(f"{key}_{_slug(label)}", record.title, caption_of(record, rows) + note, record.draw, drawn)


def _write_picture(picture: Picture, palette: Palette, out: Path) -> Section:
    png = write_picture(out / f"{picture.key}.png", picture.draw, picture.rows, palette)
    return Section(picture.key, picture.title, picture.caption, CSV, png)


def _slug(text: str) -> str:
    """A label as part of a file's name.

    Example:
        >>> _slug("cifar100, imbalance 100 (my run)")
        'cifar100_imbalance_100_my_run'
    """
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.")


def _render(comparison: Comparison, palette: Palette, overview: list[Section], blocks: list[Block]) -> str:
    return render(
        "comparison.html.j2",
        split=comparison.split,
        runs=comparison.runs,
        students=comparison.students,
        num_methods=len(comparison.methods),
        num_models=len({row["model"] for row in comparison.students}),
        overview=overview,
        blocks=blocks,
        notes=notes(comparison),
        paired=paired_table(comparison),
        paired_note=paired_note(comparison) if comparison.against else "",
        latency_note=latency_note(comparison.runs),
        palette={name: colour for name, (colour, _) in palette.items()},
    )
