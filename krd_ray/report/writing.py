"""Answers how a page and its files are written: templates, CSV, pictures, each replaced in one step.

Does not know what any page shows.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from krd_ray.atomic import write_bytes
from krd_ray.report.drawing import Draw, render_png
from krd_ray.report.formats import count, milliseconds, number, percent, points, seconds, setting
from krd_ray.report.palette import Palette
from krd_ray.report.read_run import Row


@dataclass(frozen=True)
class Section:
    """One figure as a template needs it; `png` is base64, empty when `missing` says why; `csv` is a file name."""

    key: str
    title: str
    caption: str
    csv: str
    png: str = ""
    missing: str = ""


def write_picture(path: Path, draw: Draw, rows: list[Row], palette: Palette) -> str:
    """Draw rows into a PNG file and return it in base64, for a page that stands alone."""
    png = render_png(draw, rows, palette)
    write_bytes(path, png)
    return base64.b64encode(png).decode("ascii")


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Encode rows as CSV; floats keep every digit, an unknown value is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; everything is escaped, a name that is missing is an error."""
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "number": number,
        "seconds": seconds,
        "milliseconds": milliseconds,
        "points": points,
        "setting": setting,
    }
    return environment.get_template(template).render(**values)


def _read_template(name: str) -> str:
    return resources.files("krd_ray.report").joinpath(name).read_text(encoding="utf-8")
