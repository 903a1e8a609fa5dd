"""Answers how the report's figures look: rows from `tables` in, one matplotlib figure out.

Does not compute results, read files or write them. Colour says the method, order says the size; every
colour comes with a marker or a label, so that no figure depends on colour vision.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from krd_ray.report import tables
from krd_ray.report.drawing import (
    add_legend,
    by_model,
    known_rows,
    name_bars,
    new_figure,
    panel_grid,
    percent_ticks,
    plain_log_ticks,
)
from krd_ray.report.formats import percent_with_spread, short_count
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
from krd_ray.report.read_run import Row
from krd_ray.report.tables import FEW_BELOW, GROUPS, MANY_ABOVE

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
ERROR_BARS = {"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5}
MAX_CLOUDS = 4
"""Where a panel shows more students than this, panels are higher and show no point per class, only lines."""
LINES = ("-", "--", ":", "-.")


def draw_groups(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a group, one bar a model or a method's mean; the dashed line is the teacher."""
    averaged = "num_seeds" in rows[0]
    places = _places_by_model(rows, 1.9 if averaged else 1.35)
    figure = new_figure(0.34 * (max(places) + 1) + 1.3)
    keys = [key for key in (*GROUPS, "overall") if known_rows(rows, key)] or ["overall"]
    panels = figure.subplots(1, len(keys), sharey=True, sharex=True, squeeze=False)[0]
    tallest = max(
        (row[key] + (row.get(f"{key}_std") or 0) for key in keys for row in known_rows(rows, key)), default=1
    )
    limit = (1.5 if averaged else 1.28) * (tallest or 1.0)
    for axes, key in zip(panels, keys, strict=True):
        for place, row in zip(places, rows, strict=True):
            _bar_with_value(axes, place, key, row, palette, right=limit)
        for row in known_rows(rows, key, role="teacher"):
            axes.axvline(row[key], color=INK, linestyle="--", linewidth=1, zorder=3)
        axes.set_title({"overall": "overall (top-1)"}.get(key, f"{key}-shot"))
        axes.set_xlim(0, limit)
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, tallest) if tick <= 1])
        name_bars(
            axes, places, [row["method"] if averaged and row["method"] else row["name"] for row in rows]
        )
    if averaged:
        _name_models(panels[0], places, rows)
    add_legend(
        figure, [row for row in rows if not averaged or row["role"] == "teacher"], palette, marker=False
    )
    return figure


def draw_classes(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a student model: a faint point per class, a line through bins of classes."""
    teacher = [row for row in rows if row["role"] == "teacher"]
    models = by_model([row for row in rows if row["role"] == "student"]) or {"teacher": []}
    crowded = _most_lines(models) > MAX_CLOUDS
    figure, panels = panel_grid(len(models), 3.6 if crowded else 2.6, 1)
    for axes, (model, members) in zip(panels[0], models.items(), strict=True):
        _trend(axes, teacher, TEACHER, "--", None)
        for name in dict.fromkeys(row["name"] for row in members):
            own = [row for row in known_rows(members, "accuracy") if row["name"] == name]
            if own:
                colour, marker = palette[own[0]["method"]]
                places = ([row["class_count"] for row in own], [row["accuracy"] for row in own])
                alpha = max(0.02, min(0.28, 60 / len(own)))
                if not crowded:
                    axes.scatter(*places, s=9, color=colour, alpha=alpha, linewidths=0)
                _trend(axes, own, colour, "-", marker)
        axes.set_title(model)
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(percent_ticks())
        plain_log_ticks(axes)
        for border in (FEW_BELOW, MANY_ABOVE):
            axes.axvline(border, color=LINE, linewidth=1, zorder=0)
    figure.supxlabel("training images of the class (log scale)")
    figure.supylabel("accuracy on the class")
    add_legend(figure, rows, palette)
    return figure


def draw_curves(rows: list[Row], palette: Palette) -> Figure:
    """Draw the training loss above the validation accuracy, one column a student model."""
    has_val = any(row["val_balanced"] is not None for row in rows)
    kinds = [("train_loss", "training loss")] + [("val_balanced", "val, balanced")] * has_val
    models, epochs = by_model(rows), [row["epoch"] for row in rows]
    row_inches = 2.8 if _most_lines(models) > MAX_CLOUDS else 2.0
    figure, panels = panel_grid(len(models), row_inches, len(kinds))
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
                axes.yaxis.set_major_formatter(percent_ticks())
    figure.supxlabel("epoch")
    add_legend(figure, rows, palette)
    return figure


def draw_times(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw how each student's seconds were spent, as shares of its own total."""
    figure = new_figure(0.36 * len(rows) + 1.1)
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
    name_bars(axes, range(len(rows)), [row["name"] for row in rows])
    axes.set_xlim(0, 1.09)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(percent_ticks())
    handles = [Line2D([], [], color=TIME_COLOURS[k], linewidth=7, label=TIME_LABELS[k]) for k in tables.TIMES]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def draw_teacher(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw what was served against what it cost: forwards should equal unique views."""
    figure = new_figure(2.5)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        value = row["targets"]
        axes.barh(place, value or 0, height=0.66, color=TEACHER_COLOURS[row["quantity"]])
        axes.text(value or 0, place, "  not recorded" if value is None else f"  {value:,}", va="center")
    name_bars(axes, range(len(rows)), [TEACHER_LABELS[row["quantity"]] for row in rows])
    axes.set_xlim(0, 1.14 * max(1, *(row["targets"] or 0 for row in rows)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    return figure


def draw_distribution(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw the classes from most to least frequent over a band for each group."""
    figure = new_figure(3.0)
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


def _places_by_model(rows: Sequence[Row], apart: float) -> list[float]:
    """Vertical places of bars: students of one model stand close, models apart."""
    places, place = [], 0.0
    for index, row in enumerate(rows):
        if index:
            previous = rows[index - 1]
            same = row["role"] == previous["role"] and row["model"] == previous["model"]
            place += 1.0 if same else apart
        places.append(place)
    return places


def _name_models(axes: Axes, places: Sequence[float], rows: Sequence[Row]) -> None:
    """Head each model's bars, which methods name, with the model."""
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        is_first = index == 0 or rows[index - 1]["model"] != row["model"]
        if row["role"] == "student" and (is_first or rows[index - 1]["role"] != "student"):
            at = (-0.02, place - 0.92)
            axes.text(
                *at, row["model"] or "", transform=axes.get_yaxis_transform(), ha="right", va="center",
                fontsize=9, fontweight="bold",
            )  # fmt: skip
    if rows[0]["role"] == "student":
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top - 0.5)


def _bar_with_value(axes: Axes, place: float, key: str, row: Row, palette: Palette, *, right: float) -> None:
    """Draw a bar, and its value in a column at the panel's right edge where no line crosses it."""
    value, std = row[key], row.get(f"{key}_std")
    if value is None:
        reason = "no value" if row["status"] in ("finished", "tested") else row["status"]
        axes.text(0, place, f" {reason}", va="center", color=MUTED, fontsize=8.5, style="italic")
        return
    colour = TEACHER if row["role"] == "teacher" else palette[row["method"]][0]
    axes.barh(place, value, height=0.78, color=colour, xerr=std, error_kw=ERROR_BARS)
    text = percent_with_spread(value, std)
    axes.text(right, place, text, ha="right", va="center", fontsize=8.5)


def _most_lines(models: dict[str, list[Row]]) -> int:
    """How many students, or methods' means, the fullest panel shows."""
    return max(len({row["name"] for row in members}) for members in models.values())


def _trend(axes: Axes, rows: list[Row], colour: str, line: str, marker: str | None) -> None:
    known = known_rows(rows, "accuracy")
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
        points = [row for row in known_rows(rows, key) if row["name"] == name]
        method = next(row["method"] for row in rows if row["name"] == name)
        colour, marker = palette[method]
        line = LINES[drawn.get(method, 0) % len(LINES)]
        drawn[method] = drawn.get(method, 0) + 1
        axes.plot(
            [row["epoch"] for row in points], [row[key] for row in points], color=colour, linestyle=line,
            marker=marker, markevery=max(1, len(points) // 8), markersize=4.5 if len(points) > 1 else 8,
            markeredgecolor="white", linewidth=1.6,
        )  # fmt: skip
