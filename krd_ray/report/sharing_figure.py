"""Answers how the bound looks: CPU seconds of N runs alone, of this run and of the least that its work can cost.

Does not compute anything but sums of the rows it draws.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from krd_ray.report.drawing import name_bars, new_figure
from krd_ray.report.formats import times
from krd_ray.report.palette import INK, MUTED, SHARING_COLOURS, Palette
from krd_ray.report.read_run import Row

PART_LABELS = {
    "forwards": "teacher forwards",
    "steps": "students' steps, one piece a student",
    "repeated_forwards": "repeated forwards",
    "teacher_protocol": "teacher outside its forwards",
    "student_protocol": "students outside their steps",
}
AXES_INCHES, LETTER_INCHES = 8.2, 0.072
MANY_PIECES = 24
"""Where a bar has more pieces than this, their edges are thin."""


def draw_sharing(rows: list[Row], palette: Palette) -> Figure:  # noqa: ARG001 - one signature for all
    """Draw three stacked bars; what this run took beyond the ideal stands to the right of the dashed line."""
    figure = new_figure(2.7)
    axes = figure.subplots()
    bars = list(dict.fromkeys(row["bar"] for row in rows))
    totals = {bar: sum(row["cpu_s"] for row in rows if row["bar"] == bar) for bar in bars}
    right = 1.17 * (max(totals.values()) or 1.0)
    for place, bar in enumerate(bars):
        _stack(axes, place, [row for row in rows if row["bar"] == bar], right)
        against = "" if bar == "ideal" else f" ({times(totals[bar] / totals['ideal'])} ideal)"
        text = f"  {_seconds(totals[bar])}{against}"
        axes.text(totals[bar], place, text, va="center", color=MUTED, fontsize=8.5)
    axes.axvline(totals["ideal"], color=INK, linestyle="--", linewidth=1, zorder=3)
    name_bars(axes, range(len(bars)), [_bar_name(bar, rows) for bar in bars])
    axes.set_xlim(0, right)
    axes.set_xlabel("CPU seconds")
    present = {row["part"] for row in rows if row["cpu_s"] > 0}
    handles = [
        Line2D([], [], color=SHARING_COLOURS[part], linewidth=7, label=label)
        for part, label in PART_LABELS.items()
        if part in present
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8.5)
    return figure


def _stack(axes: Axes, place: int, rows: list[Row], right: float) -> None:
    """One bar; a part below zero, which only the clocks' noise can make, is not drawn."""
    left, edge = 0.0, 0.8 if len(rows) <= MANY_PIECES else 0.2
    for row in rows:
        width = max(row["cpu_s"], 0.0)
        colour = SHARING_COLOURS[row["part"]]
        axes.barh(place, width, left=left, height=0.66, color=colour, edgecolor="white", linewidth=edge)
        room = AXES_INCHES * width / right
        if row["student"] and room > LETTER_INCHES * len(row["student"]) + 0.08:
            middle = left + width / 2
            axes.text(middle, place, row["student"], ha="center", va="center", color="white", fontsize=8.5)
        left += width


def _bar_name(bar: str, rows: list[Row]) -> str:
    num_students = sum(row["bar"] == "alone" and row["part"] == "steps" for row in rows)
    runs = "1 run" if num_students == 1 else f"{num_students} runs"
    alone = f"alone ({runs} with\nthe teacher inside)"
    return {"alone": alone, "run": "this run", "ideal": "ideal"}[bar]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
