"""Answers how accuracy against cost looks: against parameters and against the time of one image on a CPU.

Does not measure or compute anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from krd_ray.report.drawing import (
    DOTS_PER_INCH,
    add_legend,
    by_model,
    known_rows,
    new_figure,
    percent_ticks,
    plain_log_ticks,
)
from krd_ray.report.labels import Box, Stem, place_labels
from krd_ray.report.palette import MUTED, TEACHER, Palette
from krd_ray.report.read_run import Row

TITLES = {"overall": "overall (top-1)", "few": "few-shot classes"}
COSTS = {
    "num_params": "parameters (log scale)",
    "latency_ms": "CPU time of one image, one thread, ms (log scale)",
}
STEP = 0.035
"""Methods of one model stand this far apart sideways, as a share of the panel's width."""
BAND = 0.22
"""All of them together take at most this share."""
SYMBOL_INCHES, LETTER_INCHES, LINE_INCHES = 0.13, 0.075, 0.13


def draw_costs(rows: list[Row], palette: Palette) -> Figure:
    """Draw accuracy against parameters and, where it was measured, latency: one marker a student or a method's mean.

    Students of one model cost the same: a stem joins them, or, with a spread over seeds to be seen, a band in
    which they stand side by side. The teacher is a star.
    """
    costs = [key for key in COSTS if known_rows(rows, key)]
    keys = [key for key in TITLES if known_rows(rows, key)]
    beside = len(costs) == 1
    shape = (1, len(keys)) if beside else (len(keys), len(costs))
    figure = new_figure(0.7 + 2.9 * shape[0])
    panels = figure.subplots(*shape, squeeze=False)
    placed = [(key, cost) for key in keys for cost in costs]
    for axes, (key, cost) in zip(panels.flat, placed, strict=True):
        _draw_panel(axes, known_rows(known_rows(rows, cost), key), key, cost, palette)
        axes.set_title(TITLES[key])
        axes.set_xlabel(COSTS[cost])
        axes.yaxis.set_major_formatter(percent_ticks())
        plain_log_ticks(axes)
    add_legend(figure, rows, palette, star=True)
    figure.set_dpi(DOTS_PER_INCH)
    figure.draw_without_rendering()  # panels get their sizes, so that names can be placed
    for axes, (key, cost) in zip(panels.flat, placed, strict=True):
        _name_models(axes, known_rows(known_rows(rows, cost), key), key, cost)
    return figure


def _draw_panel(axes: Axes, rows: list[Row], key: str, cost: str, palette: Palette) -> None:
    sizes = [row[cost] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.9, max(sizes) * 1.9)
    for members in by_model(rows).values():
        places = _places(members, cost, axes.get_xlim())
        _join(axes, members, places, key)
        for row, x in zip(members, places, strict=True):
            colour, marker = (TEACHER, "*") if row["role"] == "teacher" else palette[row["method"]]
            axes.errorbar(
                x, row[key], yerr=row.get(f"{key}_std"), color=colour, marker=marker, capsize=2.5,
                elinewidth=1.2, markersize=13 if marker == "*" else 7.5, linestyle="",
                markeredgecolor=TEACHER if marker == "*" else "white",
            )  # fmt: skip
    axes.margins(y=0.2)


def _is_spread(members: Sequence[Row]) -> bool:
    return len(members) > 1 and any("num_seeds" in row for row in members)


def _places(members: Sequence[Row], cost: str, limits: tuple[float, float]) -> list[float]:
    """Where each row stands: at its cost, or side by side around it where there are means over seeds."""
    students = [row for row in members if row["role"] == "student"]
    if not _is_spread(students):
        return [row[cost] for row in members]
    step = min(STEP, BAND / len(students)) * math.log(limits[1] / limits[0])
    offsets = {row["name"]: step * (index - (len(students) - 1) / 2) for index, row in enumerate(students)}
    return [row[cost] * math.exp(offsets.get(row["name"], 0.0)) for row in members]


def _join(axes: Axes, members: Sequence[Row], places: Sequence[float], key: str) -> None:
    low, high = _extent(members, key)
    if max(places) == min(places):
        axes.plot([places[0]] * 2, [low, high], color="#AAB4BF", linewidth=1.2, zorder=1)
        return
    margin = (max(places) / min(places)) ** (0.5 / (len(places) - 1))
    left, right = min(places) / margin, max(places) * margin
    axes.add_patch(
        Rectangle((left, low), right - left, high - low, facecolor="#F0F2F5", edgecolor="none", zorder=0)
    )


def _extent(members: Sequence[Row], key: str) -> tuple[float, float]:
    """From the lowest to the highest end of what is drawn for a model."""
    spreads = [(row[key], row.get(f"{key}_std") or 0.0) for row in members]
    return min(mean - std for mean, std in spreads), max(mean + std for mean, std in spreads)


def _name_models(axes: Axes, rows: list[Row], key: str, cost: str) -> None:
    """Name each model once, beside its points; the panel's size and limits are already final."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    window = axes.get_window_extent()
    width, height = window.width / DOTS_PER_INCH, window.height / DOTS_PER_INCH
    to_x, to_y = width / math.log(right / left), height / (top - bottom)
    models = by_model(rows)
    stems = []
    for model, members in models.items():
        places = _places(members, cost, (left, right))
        low, high = _extent(members, key)
        middle = math.sqrt(min(places) * max(places))
        stems.append(
            Stem(
                x=math.log(middle / left) * to_x,
                low=(low - bottom) * to_y,
                high=(high - bottom) * to_y,
                width=LETTER_INCHES * len(model),
                height=LINE_INCHES,
                reach=math.log(max(places) / min(places)) * to_x / 2,
            )
        )
    names = place_labels(stems, Box(0, 0, width, height), marker=SYMBOL_INCHES)
    for model, place in zip(models, names, strict=True):
        x, y = (place.left + place.right) / 2, (place.bottom + place.top) / 2
        at = (left * math.exp(x / to_x), bottom + y / to_y)
        axes.text(*at, model, ha="center", va="center", fontsize=8.5, color=MUTED)
