"""Answers where the names of points go so that they cover neither points nor each other.

Does not draw: places are lengths from the panel's lower left corner in any one unit (figures use inches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


@dataclass(frozen=True)
class Stem:
    """What a name belongs to: points at `x`, give or take `reach`, from `low` to `high`; `width` and `height` are
    the name's."""

    x: float
    low: float
    high: float
    width: float
    height: float
    reach: float = 0.0


def place_labels(stems: Sequence[Stem], panel: Box, *, marker: float) -> list[Box]:
    """Choose a free place beside each stem: above it, else below, else right or left of one of its ends.

    Greedy, in the order given: the first place that touches nothing; else the one that covers least of other
    names and of what lies outside, then least of the points.

    Args:
        stems: what to name, in order of precedence.
        panel: the area a name may not leave.
        marker: side of a point's symbol; names keep this far from it.
    Returns:
        One box a stem, in the same order.

    Example:
        >>> [name] = place_labels([Stem(2.0, 1.0, 1.5, width=1.0, height=0.2)], Box(0, 0, 4, 3), marker=0.1)
        >>> name
        Box(left=1.5, bottom=1.6, right=2.5, top=1.8)
    """
    half = marker / 2
    points = [
        Box(stem.x - stem.reach - half, stem.low - half, stem.x + stem.reach + half, stem.high + half)
        for stem in stems
    ]
    placed: list[Box] = []
    for stem in stems:
        choices = _places(stem, marker)
        placed.append(min(choices, key=lambda box: _cost(box, panel, placed, points)))
    return placed


def _places(stem: Stem, gap: float) -> list[Box]:
    width, height = stem.width, stem.height
    centred = [
        Box(stem.x - width / 2, bottom, stem.x + width / 2, bottom + height)
        for bottom in (stem.high + gap, stem.low - gap - height)
    ]
    beside = [
        Box(left, end - height / 2, left + width, end + height / 2)
        for end in (stem.high, stem.low)
        for left in (stem.x + stem.reach + gap, stem.x - stem.reach - gap - width)
    ]
    return centred + beside


def _cost(box: Box, panel: Box, names: Sequence[Box], points: Sequence[Box]) -> tuple[float, float]:
    unreadable = sum(box.overlap(name) for name in names) + (box.area - box.overlap(panel))
    return (round(unreadable, 9), sum(box.overlap(point) for point in points))
