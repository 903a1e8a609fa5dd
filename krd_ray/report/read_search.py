"""Answers what a search directory says: its settings, its trials, what it cost, how its best was confirmed.

Does not compute or draw, and knows neither Ray nor Optuna: the search has written plain JSON, CSV and YAML.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krd_ray.errors import RunError
from krd_ray.report.read_run import Json, Row, read_json_file

PARAM = "param "
TEXT = ("state", "from", "error")
RECORD = "search.json"
NATS = ("val/loss",)
"""Metrics that are no fractions."""


@dataclass(frozen=True)
class SearchRecord:
    """Everything that the report needs from one search directory; optional pieces are `None` (or empty).

    Attributes:
        path: the directory.
        record: search.json.
        trials: rows of trials.csv, numbers as numbers, unknown ones as None; parameters below `param `.
        ledger, environment, dataset: as in a run directory.
        base_text, best_text, space_text: the config as it stood, the best one, the space.
    """

    path: Path
    record: Json
    trials: list[Row]
    ledger: Json | None
    environment: Json | None
    dataset: Json
    base_text: str
    best_text: str | None
    space_text: str

    @property
    def metrics(self) -> list[str]:
        return list(self.record["metric"])

    @property
    def modes(self) -> list[str]:
        return list(self.record["mode"])

    @property
    def parameters(self) -> list[str]:
        """Names of everything that was drawn."""
        return [
            key.removeprefix(PARAM)
            for key in (self.trials[0] if self.trials else {})
            if key.startswith(PARAM)
        ]

    @property
    def confirmation(self) -> Path | None:
        """The run in which the best and the baseline were trained again; None where there is none."""
        best = self.record.get("best") or {}
        folder = self.path / "confirm" / str(best.get("number"))
        return folder if (folder / "evaluation.json").is_file() else None


def is_search(path: Path) -> bool:
    """Returns whether a directory is a search's, and not a run's."""
    return (path / RECORD).is_file()


def read_search(path: Path) -> SearchRecord:
    """Read one search directory, finished or still being written.

    Args:
        path: a directory written by `krd tune`.
    Returns:
        The search.
    Raises:
        RunError: no search directory, or a file in it is not what the format promises.
    """
    record, dataset = read_json_file(path / RECORD), read_json_file(path / "dataset.json")
    if record is None or dataset is None:
        raise RunError(
            f"{path} is not a search directory: it has no {RECORD if record is None else 'dataset.json'}"
        )
    for key in ("metric", "mode", "space", "options", "name"):
        if key not in record:
            raise RunError(f"{path / RECORD} has no {key}; it was written by another version, or by hand")
    return SearchRecord(
        path=path,
        record=record,
        trials=_read_trials(path / "trials.csv"),
        ledger=read_json_file(path / "ledger.json"),
        environment=read_json_file(path / "environment.json"),
        dataset=dataset,
        base_text=_text(path / "base.yaml") or "",
        best_text=_text(path / "best.yaml"),
        space_text=_text(path / record["space"]["file"]) or "",
    )


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_trials(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str) -> Any:
    """A cell as what it was written from.

    Example:
        >>> _value("param loss.rrd.weight", "0.5"), _value("error", "1"), _value("val/few", ""), _value("number", "3")
        (0.5, '1', None, 3)
    """
    if text == "":
        return None
    if key in TEXT:
        return text
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
