"""Answers what all figures of the report share: size, style, axes, legends, encoding.

Does not know what any figure shows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from krd_ray.report.formats import short_count
from krd_ray.report.palette import INK, LINE, MUTED, TEACHER, Palette
from krd_ray.report.read_run import Row

MAX_COLUMNS = 4
WIDTH_INCHES = 11.0
DOTS_PER_INCH = 160
LEGEND_CHARACTERS = 130
"""About as many characters, symbols counted, as fit into one line of a legend."""
STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "figure.labelsize": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6EAEE",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.06,
}

Draw = Callable[[list[Row], Palette], Figure]


def render_png(draw: Draw, rows: list[Row], palette: Palette) -> bytes:
    """Draw rows in the report's style and encode the figure; matplotlib's global settings stay as they were.

    Args:
        draw: one of the `draw_*` functions.
        rows: what `tables` or `comparison` gave for this figure, not empty.
        palette: from `method_palette`, the same for every figure of a page.
    Returns:
        The bytes of a PNG, 1,760 pixels wide; the same rows give the same bytes.
    """
    buffer = io.BytesIO()
    with style.context(STYLE):
        draw(rows, palette).savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(height_inches: float) -> Figure:
    """An empty figure of the report's width."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def panel_grid(num_models: int, row_inches: float, num_kinds: int) -> tuple[Figure, list[list[Axes]]]:
    """Lay out one panel a model and kind, four columns at most; kinds of one model stand above each other.

    Returns:
        The figure, and for each kind the panels of the models in order; unused panels are removed.
    """
    if num_models == 1 and num_kinds > 1:
        figure = new_figure(row_inches + 1.3)
        return figure, [[axes] for axes in figure.subplots(1, num_kinds)]
    num_columns = min(MAX_COLUMNS, max(num_models, 1))
    num_blocks = -(-num_models // num_columns)
    figure = new_figure(row_inches * num_blocks * num_kinds + 0.9)
    grid = figure.subplots(num_blocks * num_kinds, num_columns, squeeze=False)
    panels: list[list[Axes]] = [list(grid[kind::num_kinds].flat) for kind in range(num_kinds)]
    for unused in (axes for row in panels for axes in row[num_models:]):
        unused.remove()
    return figure, [row[:num_models] for row in panels]


def name_bars(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Name horizontal bars, the first one on top."""
    axes.set_yticks(places, names)
    axes.set_ylim(max(places) + 0.7, min(places) - 0.7)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def known_rows(rows: Iterable[Row], key: str, role: str | None = None) -> list[Row]:
    """The rows that know a number, of one role if it is given."""
    return [row for row in rows if row[key] is not None and role in (None, row["role"])]


def percent_ticks() -> FuncFormatter:
    """Ticks of a fraction, written as percentages."""
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by model, keeping the order of sizes; a student of unknown model stands for itself."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["model"] or row["name"]), []).append(row)
    return groups


def plain_log_ticks(axes: Axes) -> None:
    """Name a logarithmic x axis at 1, 2 and 5 times powers of ten."""
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def add_legend(
    figure: Figure, rows: Iterable[Row], palette: Palette, *, marker: bool = True, star: bool = False
) -> None:
    """Name the teacher and the methods above the panels, in one line if they fit, else in columns."""
    rows = list(rows)
    present = {row["method"] for row in rows if row["role"] == "student"}
    handles = []
    if any(row["role"] == "teacher" for row in rows):
        look: dict[str, Any] = (
            {"marker": "*", "linestyle": "", "markersize": 12} if star else {"linestyle": "--"}
        )
        handles.append(Line2D([], [], color=TEACHER, label="teacher", **look))
    for name, (colour, shape) in palette.items():
        if name in present:
            look = {"marker": shape, "linewidth": 0 if star else 1.6} if marker else {"linewidth": 7}
            handles.append(Line2D([], [], color=colour, label=name or "loss not known", **look))
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    in_one_line = sum(len(str(handle.get_label())) + 8 for handle in handles) <= LEGEND_CHARACTERS
    columns = len(handles) if in_one_line else LEGEND_CHARACTERS // (longest + 8)
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, columns), fontsize=9)
