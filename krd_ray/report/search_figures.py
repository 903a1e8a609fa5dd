"""Answers how the pictures of a search look: rows from `search_tables` in, one matplotlib figure out.

Does not compute results. Every colour comes with a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from krd_ray.report.drawing import MAX_COLUMNS, name_bars, new_figure, percent_ticks
from krd_ray.report.formats import short_count
from krd_ray.report.palette import INK, METHOD_COLOURS, TRIAL_LOOKS, Palette
from krd_ray.report.read_run import Row
from krd_ray.report.read_search import NATS

WIDE_RATIO = 20
"""A positive parameter whose values span more than this ratio gets a logarithmic axis."""
SIZES = {"baseline": 150, "best": 80}


def draw_history(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a metric: trials in order, and the best complete one so far as a line."""
    del palette
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = new_figure(2.9)
    for axes, metric in zip(_panels(figure, len(metrics)), metrics, strict=True):
        own = [row for row in rows if row["metric"] == metric]
        known = [row for row in own if row["best_so_far"] is not None]
        axes.step(
            [row["number"] for row in known],
            [row["best_so_far"] for row in known],
            where="post",
            color=INK,
            linewidth=1.2,
        )
        _scatter(axes, own, "number", "value")
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _name_y(axes, metric)
    _legend(figure, rows, line="best so far")
    return figure


def draw_importance(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a metric, one bar a parameter."""
    del palette
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    most = max(sum(row["metric"] == metric for row in rows) for metric in metrics)
    figure = new_figure(0.32 * most + 1.1)
    for axes, metric in zip(_panels(figure, len(metrics)), metrics, strict=True):
        own = [row for row in rows if row["metric"] == metric]
        places = [float(place) for place in range(len(own))]
        axes.barh(places, [row["share"] for row in own], color=METHOD_COLOURS[0], height=0.62)
        for place, row in zip(places, own, strict=True):
            axes.text(row["share"] + 0.01, place, f"{100 * row['share']:.0f}%", va="center", fontsize=8.5)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.set_title(metric)
        name_bars(axes, places, [row["parameter"] for row in own])
    return figure


def draw_slices(rows: list[Row], palette: Palette) -> Figure:
    """Draw one panel a parameter and metric: each trial's setting against what it reached."""
    del palette
    cells = list(dict.fromkeys((row["metric"], row["parameter"]) for row in rows))
    columns = min(MAX_COLUMNS, len(cells))
    num_rows = math.ceil(len(cells) / columns)
    figure = new_figure(2.35 * num_rows + 0.5)
    grid = list(figure.subplots(num_rows, columns, squeeze=False).flat)
    for axes, (metric, name) in zip(grid, cells, strict=False):
        own = [row for row in rows if (row["metric"], row["parameter"]) == (metric, name)]
        _slice(axes, own)
        axes.set_title(name, fontsize=9)
        _name_y(axes, metric)
    for unused in grid[len(cells) :]:
        unused.remove()
    _legend(figure, rows)
    return figure


def draw_trade_off(rows: list[Row], palette: Palette) -> Figure:
    """Draw two figures of each trial against each other; a line joins those that no other one beats."""
    del palette
    figure = new_figure(4.2)
    axes = figure.subplots()
    front = sorted((row for row in rows if row["on_front"]), key=lambda row: (row["x"], row["y"]))
    axes.plot([row["x"] for row in front], [row["y"] for row in front], color=INK, linewidth=1.1, zorder=2)
    _scatter(axes, rows, "x", "y")
    for row in rows:
        if row["on_front"] or row["kind"] in ("best", "baseline"):
            axes.annotate(
                str(row["number"]),
                (row["x"], row["y"]),
                textcoords="offset points",
                xytext=(6, 5),
                fontsize=8,
            )
    axes.set_xlabel(rows[0]["first"])
    if rows[0]["first"] not in NATS:
        axes.xaxis.set_major_formatter(percent_ticks())
    _name_y(axes, rows[0]["second"])
    _legend(figure, rows, line="no other trial is better in both" if front else None)
    return figure


def draw_forwards(rows: list[Row], palette: Palette) -> Figure:
    """Draw the teacher's forwards of the search beside those of one teacher per trial."""
    del palette
    figure = new_figure(1.5)
    axes = figure.subplots()
    places = [float(place) for place in range(len(rows))]
    colours = ["#C3CCD6", METHOD_COLOURS[1]]
    axes.barh(places, [row["forwards"] for row in rows], color=colours, height=0.6)
    for place, row in zip(places, rows, strict=True):
        axes.text(row["forwards"], place, f" {row['forwards']:,}", va="center", fontsize=9)
    axes.set_xlim(0, 1.15 * max(row["forwards"] for row in rows))
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_xlabel("teacher forwards")
    name_bars(axes, places, [row["what"] for row in rows])
    return figure


def _panels(figure: Figure, number: int) -> Sequence[Axes]:
    return list(figure.subplots(1, number, squeeze=False)[0])


def _slice(axes: Axes, rows: Sequence[Row]) -> None:
    """A number on its axis, logarithmic where it spans much; anything else as names."""
    settings = [row["setting"] for row in rows]
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in settings):
        _scatter(axes, rows, "setting", "value")
        if min(settings) > 0 and max(settings) / min(settings) > WIDE_RATIO:
            axes.set_xscale("log")
        return
    names = sorted({str(each) for each in settings})
    _scatter(axes, [{**row, "setting": names.index(str(row["setting"]))} for row in rows], "setting", "value")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _scatter(axes: Axes, rows: Iterable[Row], x: str, y: str) -> None:
    rows = list(rows)
    for kind, (colour, marker) in TRIAL_LOOKS.items():
        own = [row for row in rows if row["kind"] == kind]
        look: dict[str, Any] = {"facecolors": "none"} if kind == "stopped early" else {}
        axes.scatter(
            [row[x] for row in own],
            [row[y] for row in own],
            s=SIZES.get(kind, 30),
            c=None if look else colour,
            edgecolors=colour if look else "white",
            linewidths=1.0 if look else 0.5,
            marker=marker,
            zorder=3 + list(TRIAL_LOOKS).index(kind),
            **look,
        )


def _name_y(axes: Axes, metric: str) -> None:
    axes.set_ylabel(metric)
    if metric not in NATS:
        axes.yaxis.set_major_formatter(percent_ticks())


def _legend(figure: Figure, rows: Iterable[Row], line: str | None = None) -> None:
    present = {row["kind"] for row in rows}
    handles = [Line2D([], [], color=INK, linewidth=1.2, label=line)] if line else []
    for kind, (colour, marker) in TRIAL_LOOKS.items():
        if kind in present:
            filled = {} if kind != "stopped early" else {"markerfacecolor": "none"}
            size = 11 if kind == "baseline" else 6.5
            label = "baseline: the config as it stands" if kind == "baseline" else kind
            look: dict[str, Any] = {"marker": marker, "linestyle": "", "markersize": size, **filled}
            handles.append(Line2D([], [], color=colour, label=label, **look))
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, len(handles)), fontsize=9)
