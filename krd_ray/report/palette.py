"""Answers which colour and marker means what, the same in every figure and on the page.

Does not draw. A colour never stands alone: a marker, a label or a place says the same.
"""

from __future__ import annotations

from collections.abc import Iterable

INK, MUTED, LINE, TEACHER = "#1F2933", "#5B6673", "#C9D0D8", "#4A5563"
METHOD_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#5D3A9B", "#7F7F7F"),
    *("#7A4100", "#00A6A6", "#A3123F", "#6B8E23"),
)
"""Okabe and Ito's colour-blind safe palette, its yellow darkened to stay legible on white; then four more, which
some eyes will tell apart by their markers only."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
GROUP_SHADES = {"many": "#DCEAF5", "medium": "#F0F2F5", "few": "#FBE7D6"}
TIME_COLOURS = {"compute_s": "#33658A", "wait_targets_s": "#F26419", "wait_data_s": "#C3CCD6"}
TEACHER_COLOURS = {
    "served": "#8FA3B5",
    "hits": "#33658A",
    "joined": "#33658A",
    "forwards": "#F26419",
    "unique_views": "#C3CCD6",
}
SHARING_COLOURS = {
    "forwards": "#F26419",
    "steps": "#33658A",
    "repeated_forwards": "#8C3A0E",
    "teacher_protocol": "#F9C5A3",
    "student_protocol": "#B9C7D6",
}
TRIAL_LOOKS = {
    "complete": ("#0072B2", "o"),
    "from an earlier search": ("#56B4E9", "D"),
    "stopped early": ("#9AA5B1", "v"),
    "baseline": ("#D55E00", "*"),
    "best": ("#009E73", "P"),
}
"""Colour and marker of a trial, by what it is; a later entry is drawn over an earlier one."""

Palette = dict[str | None, tuple[str, str]]


def method_palette(methods: Iterable[str | None]) -> Palette:
    """Give each method one colour and one marker, the same in every figure and on the page.

    From the thirteenth method on colours come again with other markers; 96 methods are told apart.

    Args:
        methods: in the order of the legend, repeated or not; `None` stands for a loss that is not known.
    Returns:
        method -> (hex colour, matplotlib marker), in order of first appearance, None last.

    Example:
        >>> method_palette(["krd", "ce", "krd"])
        {'krd': ('#0072B2', 'o'), 'ce': ('#D55E00', 's')}
    """
    names = dict.fromkeys(methods)
    palette: Palette = {}
    for index, name in enumerate(name for name in names if name is not None):
        marker = (index + index // (2 * len(METHOD_COLOURS))) % len(MARKERS)
        palette[name] = (METHOD_COLOURS[index % len(METHOD_COLOURS)], MARKERS[marker])
    return palette | {None: ("#7B8794", "p")} if None in names else palette
