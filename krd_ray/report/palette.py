"""Answers which colour and marker means what, the same in every figure and on the page.

Does not draw. A colour never stands alone: a marker, a label or a place says the same.
"""

from __future__ import annotations

from collections.abc import Iterable

INK, MUTED, LINE, TEACHER = "#1F2933", "#5B6673", "#C9D0D8", "#4A5563"
LOSS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#5D3A9B", "#7F7F7F")
"""Okabe and Ito's colour-blind safe palette, its yellow darkened to stay legible on white."""
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

Palette = dict[str | None, tuple[str, str]]


def loss_palette(loss_names: Iterable[str | None]) -> Palette:
    """Give each loss one colour and one marker, the same in every figure and on the page.

    Args:
        loss_names: any order, repeated or not; `None` stands for a loss that is not known.
    Returns:
        loss name -> (hex colour, matplotlib marker), names in alphabetical order.

    Example:
        >>> loss_palette(["krd", "ce", "krd"])
        {'ce': ('#0072B2', 'o'), 'krd': ('#D55E00', 's')}
    """
    names = set(loss_names)
    palette: Palette = {}
    for index, name in enumerate(sorted(name for name in names if name is not None)):
        palette[name] = (LOSS_COLOURS[index % len(LOSS_COLOURS)], MARKERS[index % len(MARKERS)])
    return palette | {None: ("#7B8794", "p")} if None in names else palette
