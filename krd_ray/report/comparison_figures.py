"""Answers how methods look over several data sets: accuracy against the imbalance ratio.

Does not compute results; one data set's methods are drawn by `figures.draw_groups` and `cost_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from krd_ray.report.drawing import add_legend, by_model, known_rows, panel_grid, percent_ticks
from krd_ray.report.palette import TEACHER, Palette
from krd_ray.report.read_run import Row

KINDS = {"top1": "overall", "many": "many-shot", "few": "few-shot"}


def draw_imbalance(rows: list[Row], palette: Palette) -> Figure:
    """Draw accuracy over the imbalance ratio, one line a method with its spread, one column a model.

    Args:
        rows: cells of a comparison, of one data set name and several ratios.
        palette: of the methods.
    """
    students = [row for row in rows if row["role"] == "student"]
    kinds = {key: name for key, name in KINDS.items() if known_rows(students, key)}
    models = by_model(students)
    figure, panels = panel_grid(len(models), 2.4, len(kinds))
    ratios = sorted({row["imbalance_ratio"] for row in rows})
    for kind_panels, (key, name) in zip(panels, kinds.items(), strict=True):
        for axes, (model, members) in zip(kind_panels, models.items(), strict=True):
            _line(axes, known_rows(rows, key, role="teacher"), key, TEACHER, "", 0.0)
            methods = list(dict.fromkeys(row["method"] for row in members))
            for index, method in enumerate(methods):
                own = [row for row in known_rows(members, key) if row["method"] == method]
                _line(axes, own, key, *palette[method], 0.012 * (index - (len(methods) - 1) / 2))
            axes.set_title(f"{model}: {name}")
            _ratio_axis(axes, ratios)
    figure.supxlabel("imbalance ratio (head count / tail count, log scale)")
    add_legend(figure, rows, palette)
    return figure


def _line(axes: Axes, rows: Sequence[Row], key: str, colour: str, marker: str, shift: float) -> None:
    """One method's line; `shift` moves it sideways by a share of a decade, so that spreads do not hide each other."""
    own = sorted(rows, key=lambda row: float(row["imbalance_ratio"]))
    axes.errorbar(
        [row["imbalance_ratio"] * 10**shift for row in own],
        [row[key] for row in own],
        yerr=[math.nan if row[f"{key}_std"] is None else row[f"{key}_std"] for row in own],
        color=colour,
        marker=marker,
        linestyle="-" if marker else "--",
        linewidth=1.5,
        markersize=6,
        markeredgecolor="white",
        elinewidth=1.1,
        capsize=2.5,
    )


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(ratios[0] / 1.3, ratios[-1] * 1.3)
    axes.xaxis.set_major_locator(FixedLocator(list(ratios)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(percent_ticks())
