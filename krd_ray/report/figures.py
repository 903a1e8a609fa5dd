"""Answers how the report's figures look: rows from `tables` in, one matplotlib figure out.

Does not compute results, read files or write them. Colour says the loss, order says the size; every
colour comes with a marker or a label, so that no figure depends on colour vision.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from krd_ray.report import tables
from krd_ray.report.formats import short_count
from krd_ray.report.labels import Box, Stem, place_labels
from krd_ray.report.palette import (
    GROUP_SHADES,
    INK,
    LINE,
    MUTED,
    TEACHER,
    TEACHER_COLOURS,
    TIME_COLOURS,
    Palette,
)
from krd_ray.report.tables import FEW_BELOW, GROUPS, MANY_ABOVE, Row

TIME_LABELS = {
    "compute_s": "compute",
    "wait_targets_s": "waiting for targets",
    "wait_data_s": "waiting for data",
}
TEACHER_LABELS = {
    "served": "targets served",
    "hits": "found in the store",
    "joined": "computed for another student",
    "forwards": "teacher forwards",
    "unique_views": "unique views",
}
LINES = ("-", "--", ":", "-.")
MAX_COLUMNS = 4
WIDTH_INCHES = 11.0
DOTS_PER_INCH = 160
PANEL_INCHES = (4.7, 2.4)
"""About the size of one panel of `draw_params`, to place names in."""
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
        draw: one of the `draw_*` functions below.
        rows: what `tables` gave for this figure, not empty.
        palette: from `loss_palette`, the same for every figure of a page.
    Returns:
        The bytes of a PNG, 1,760 pixels wide; the same rows give the same bytes.
    """
    buffer = io.BytesIO()
    with style.context(STYLE):
        draw(rows, palette).savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def draw_groups(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a group, one bar a model; the dashed line is the teacher."""
    figure = _figure(0.34 * len(rows) + 1.3)
    panels = figure.subplots(1, 4, sharey=True, sharex=True)
    places = _places_by_model(rows)
    limit = 1.28 * (max(row[key] or 0.0 for row in rows for key in (*GROUPS, "overall")) or 1.0)
    for axes, key in zip(panels, (*GROUPS, "overall"), strict=True):
        for place, row in zip(places, rows, strict=True):
            _bar_with_value(axes, place, row[key], row, palette, right=limit)
        for row in _known(rows, key, role="teacher"):
            axes.axvline(row[key], color=INK, linestyle="--", linewidth=1, zorder=3)
        axes.set_title({"overall": "overall (top-1)"}.get(key, f"{key}-shot"))
        axes.set_xlim(0, limit)
        axes.xaxis.set_major_formatter(_percent())
        axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, limit / 1.28) if tick <= 1])
        _name_bars(axes, places, [row["name"] for row in rows])
    _legend(figure, rows, palette, marker=False)
    return figure


def draw_classes(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a student model: a faint point per class, a line through bins of classes."""
    teacher = [row for row in rows if row["role"] == "teacher"]
    models = _by_model([row for row in rows if row["role"] == "student"]) or {"teacher": []}
    figure, panels = _panel_grid(len(models), 2.6, 1)
    for axes, (model, members) in zip(panels[0], models.items(), strict=True):
        _trend(axes, teacher, TEACHER, "--", None)
        for name in dict.fromkeys(row["name"] for row in members):
            own = [row for row in _known(members, "accuracy") if row["name"] == name]
            if own:
                colour, marker = palette[own[0]["loss_name"]]
                places = ([row["class_count"] for row in own], [row["accuracy"] for row in own])
                alpha = max(0.02, min(0.28, 60 / len(own)))
                axes.scatter(*places, s=9, color=colour, alpha=alpha, linewidths=0)
                _trend(axes, own, colour, "-", marker)
        axes.set_title(model)
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(_percent())
        _plain_log_ticks(axes)
        for border in (FEW_BELOW, MANY_ABOVE):
            axes.axvline(border, color=LINE, linewidth=1, zorder=0)
    figure.supxlabel("training images of the class (log scale)")
    figure.supylabel("accuracy on the class")
    _legend(figure, rows, palette)
    return figure


def draw_curves(rows: list[Row], palette: Palette) -> Figure:
    """Draw the training loss above the validation accuracy, one column a student model."""
    has_val = any(row["val_balanced"] is not None for row in rows)
    kinds = [("train_loss", "training loss")] + [("val_balanced", "val, balanced")] * has_val
    models, epochs = _by_model(rows), [row["epoch"] for row in rows]
    figure, panels = _panel_grid(len(models), 2.0, len(kinds))
    for kind_panels, (key, label) in zip(panels, kinds, strict=True):
        values = [row[key] for row in rows if row[key] is not None]
        for axes, (model, members) in zip(kind_panels, models.items(), strict=True):
            _curves_of_model(axes, members, key, palette)
            axes.set_title(f"{model}: {label}")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
            if values:
                margin = 0.06 * (max(values) - min(values)) or 0.05
                axes.set_ylim(min(values) - margin, max(values) + margin)
            if key == "val_balanced":
                axes.yaxis.set_major_formatter(_percent())
    figure.supxlabel("epoch")
    _legend(figure, rows, palette)
    return figure


def draw_params(rows: list[Row], palette: Palette) -> Figure:
    """Draw accuracy against parameters: one marker a student, one stem a model, the teacher as a star."""
    figure = _figure(3.5)
    panels = figure.subplots(1, 2, sharex=True)
    kinds = (("overall", "overall (top-1)"), ("few", "few-shot classes"))
    for axes, (key, title) in zip(panels, kinds, strict=True):
        for loss_name, (colour, marker) in palette.items():
            own = [row for row in _known(rows, key, role="student") if row["loss_name"] == loss_name]
            axes.plot(
                [row["num_params"] for row in own], [row[key] for row in own], color=colour, marker=marker,
                markersize=8, linestyle="", markeredgecolor="white",
            )  # fmt: skip
        for row in _known(rows, key, role="teacher"):
            axes.plot(row["num_params"], row[key], "*", color=TEACHER, markersize=13)
        sizes = [row["num_params"] for row in rows]
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.9, max(sizes) * 1.9)
        axes.margins(y=0.2)
        _name_models(axes, rows, key)
        axes.set_title(title)
        axes.yaxis.set_major_formatter(_percent())
        _plain_log_ticks(axes)
        axes.set_xlabel("parameters (log scale)")
    _legend(figure, rows, palette, star=True)
    return figure


def draw_times(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw how each student's seconds were spent, as shares of its own total."""
    figure = _figure(0.36 * len(rows) + 1.1)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        total = sum(row[key] or 0.0 for key in tables.TIMES)
        left = 0.0
        for key in tables.TIMES:
            share = (row[key] or 0.0) / total if total else 0.0
            axes.barh(place, share, left=left, height=0.66, color=TIME_COLOURS[key], edgecolor="white")
            if share >= 0.06:
                ink = INK if key == "wait_data_s" else "white"
                axes.text(
                    left + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=8.5
                )
            left += share
        axes.text(1.01, place, f"{total:,.0f} s" if total else "no time booked", va="center", color=MUTED)
    _name_bars(axes, range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(0, 1.09)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(_percent())
    handles = [Line2D([], [], color=TIME_COLOURS[k], linewidth=7, label=TIME_LABELS[k]) for k in tables.TIMES]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def draw_teacher(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw what was served against what it cost: forwards should equal unique views."""
    figure = _figure(2.5)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        value = row["targets"]
        axes.barh(place, value or 0, height=0.66, color=TEACHER_COLOURS[row["quantity"]])
        axes.text(value or 0, place, "  not recorded" if value is None else f"  {value:,}", va="center")
    _name_bars(axes, range(len(rows)), [TEACHER_LABELS[row["quantity"]] for row in rows])
    axes.set_xlim(0, 1.14 * max(1, *(row["targets"] or 0 for row in rows)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    return figure


def draw_distribution(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw the classes from most to least frequent over a band for each group."""
    figure = _figure(3.0)
    axes = figure.subplots()
    counts = [row["class_count"] for row in rows]
    floor = max(0.6, 0.5 * min(counts))
    if len(rows) <= 60:
        axes.bar(range(len(rows)), counts, width=0.86, color="#33658A")
    else:  # one outline: ten thousand bars would take seconds to draw
        edges = [rank - 0.5 for rank in range(len(rows) + 1)]
        axes.stairs(counts, edges, baseline=floor, fill=True, color="#33658A")
    axes.set_yscale("log")
    axes.set_ylim(floor, 3.2 * max(counts))
    for group in GROUPS:
        ranks = [row["rank"] for row in rows if row["group"] == group]
        if ranks:
            axes.axvspan(ranks[0] - 0.5, ranks[-1] + 0.5, color=GROUP_SHADES[group], zorder=0)
            text = f"{group}\n{len(ranks)} class{'es' * (len(ranks) != 1)}"
            place = ((ranks[0] + ranks[-1]) / 2, 0.97)
            axes.text(*place, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8.5)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("class, most frequent first")
    axes.set_ylabel("training images (log scale)")
    return figure


def _figure(height_inches: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _panel_grid(num_models: int, row_inches: float, num_kinds: int) -> tuple[Figure, list[list[Axes]]]:
    """Lay out one panel a model and kind, four columns at most; kinds of one model stand above each other.

    Returns:
        The figure, and for each kind the panels of the models in order; unused panels are removed.
    """
    if num_models == 1 and num_kinds > 1:
        figure = _figure(row_inches + 1.3)
        return figure, [[axes] for axes in figure.subplots(1, num_kinds)]
    num_columns = min(MAX_COLUMNS, max(num_models, 1))
    num_blocks = -(-num_models // num_columns)
    figure = _figure(row_inches * num_blocks * num_kinds + 0.9)
    grid = figure.subplots(num_blocks * num_kinds, num_columns, squeeze=False)
    panels: list[list[Axes]] = [list(grid[kind::num_kinds].flat) for kind in range(num_kinds)]
    for unused in (axes for row in panels for axes in row[num_models:]):
        unused.remove()
    return figure, [row[:num_models] for row in panels]


def _places_by_model(rows: Sequence[Row]) -> list[float]:
    """Vertical places of bars: students of one model stand close, models apart."""
    places, place = [], 0.0
    for index, row in enumerate(rows):
        if index:
            previous = rows[index - 1]
            same = row["role"] == previous["role"] and row["model"] == previous["model"]
            place += 1.0 if same else 1.35
        places.append(place)
    return places


def _name_bars(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Name horizontal bars, the first one on top."""
    axes.set_yticks(places, names)
    axes.set_ylim(max(places) + 0.7, min(places) - 0.7)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _bar_with_value(
    axes: Axes, place: float, value: float | None, row: Row, palette: Palette, *, right: float
) -> None:
    """Draw a bar, and its value in a column at the panel's right edge where no line crosses it."""
    if value is None:
        reason = "no value" if row["status"] in ("finished", "tested") else row["status"]
        axes.text(0, place, f" {reason}", va="center", color=MUTED, fontsize=8.5, style="italic")
        return
    colour = TEACHER if row["role"] == "teacher" else palette[row["loss_name"]][0]
    axes.barh(place, value, height=0.78, color=colour)
    axes.text(right, place, f"{100 * value:.1f}", ha="right", va="center", fontsize=8.5)


def _trend(axes: Axes, rows: list[Row], colour: str, line: str, marker: str | None) -> None:
    known = _known(rows, "accuracy")
    points = tables.binned_means(
        [row["class_count"] for row in known], [row["accuracy"] for row in known], num_bins=10
    )
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=colour, linestyle=line, marker=marker,
        markersize=5, markeredgecolor="white", linewidth=1.6,
    )  # fmt: skip


def _curves_of_model(axes: Axes, rows: list[Row], key: str, palette: Palette) -> None:
    drawn: dict[str | None, int] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [row for row in _known(rows, key) if row["name"] == name]
        loss_name = next(row["loss_name"] for row in rows if row["name"] == name)
        colour, marker = palette[loss_name]
        line = LINES[drawn.get(loss_name, 0) % len(LINES)]
        drawn[loss_name] = drawn.get(loss_name, 0) + 1
        axes.plot(
            [row["epoch"] for row in points], [row[key] for row in points], color=colour, linestyle=line,
            marker=marker, markevery=max(1, len(points) // 8), markersize=4.5 if len(points) > 1 else 8,
            markeredgecolor="white", linewidth=1.6,
        )  # fmt: skip


def _name_models(axes: Axes, rows: list[Row], key: str) -> None:
    """Join the students of one model by a stem and name it once; the panel's limits are already final."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    to_x = PANEL_INCHES[0] / math.log(right / left)
    to_y = PANEL_INCHES[1] / (top - bottom)
    models, stems = _by_model(_known(rows, key)), []
    for model, members in models.items():
        size, values = members[0]["num_params"], [row[key] for row in members]
        axes.plot([size, size], [min(values), max(values)], color="#AAB4BF", linewidth=1.2, zorder=1)
        low, high = ((value - bottom) * to_y for value in (min(values), max(values)))
        stems.append(Stem(math.log(size / left) * to_x, low, high, 0.075 * len(model), 0.13))
    places = place_labels(stems, Box(0, 0, *PANEL_INCHES), marker=0.13)
    for model, place in zip(models, places, strict=True):
        x, y = (place.left + place.right) / 2, (place.bottom + place.top) / 2
        at = (left * math.exp(x / to_x), bottom + y / to_y)
        axes.text(*at, model, ha="center", va="center", fontsize=8.5, color=MUTED)


def _known(rows: Iterable[Row], key: str, role: str | None = None) -> list[Row]:
    return [row for row in rows if row[key] is not None and role in (None, row["role"])]


def _percent() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


def _by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by model, keeping the order of sizes; a student of unknown model stands for itself."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["model"] or row["name"]), []).append(row)
    return groups


def _plain_log_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _legend(
    figure: Figure, rows: Iterable[Row], palette: Palette, *, marker: bool = True, star: bool = False
) -> None:
    """One line above the panels: the teacher, then the losses."""
    rows = list(rows)
    present = {row["loss_name"] for row in rows if row["role"] == "student"}
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
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, len(handles)), fontsize=9)
