"""Answers what a run directory says: its settings, its data, its students, its test and its ledger.

Does not compute, draw or write anything, and never guesses: a piece that is not there yet is `None`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from krd_ray.errors import RunError

Json = dict[str, Any]
Row = dict[str, Any]
"""One line of a table: column -> value, `None` where it is not known."""


@dataclass(frozen=True)
class Student:
    """One student as its directory describes it.

    `result` is empty until the student ends; `status` is then `unfinished`, or `not started` before its first
    row (a run directory cannot tell a running student from one whose driver died).
    `num_broken_lines` counts metric lines that could not be read, a half-written last line aside.
    """

    name: str
    status: str
    result: Json
    rows: list[Json]
    num_broken_lines: int


@dataclass(frozen=True)
class Run:
    """Everything the report needs from one run directory; optional pieces are `None` (or empty)."""

    path: Path
    config: Json
    config_text: str
    dataset: Json
    environment: Json | None
    students: list[Student]
    evaluation: Json | None
    ledger: Json | None


def read_run(run_dir: Path) -> Run:
    """Read one run directory, finished or still being written.

    Args:
        run_dir: a directory written by `krd distill` or a teacher run.
    Returns:
        The run; `students` sorted by name, every known student present whatever became of it.
    Raises:
        RunError: `config.yaml` or `dataset.json` is missing, or a file is not what the format promises.

    Example:
        >>> read_run(Path("no/such/run"))
        Traceback (most recent call last):
        krd_ray.errors.RunError: no/such/run is not a directory; expected a run directory such as runs/<name>
    """
    _check_is_run_dir(run_dir)
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = _parse_config(config_text, run_dir / "config.yaml")
    dataset = read_json_file(run_dir / "dataset.json")
    assert dataset is not None, "checked above"
    _check_dataset(dataset, run_dir / "dataset.json")
    evaluation = read_json_file(run_dir / "evaluation.json")
    if evaluation is not None:
        _check_evaluation(evaluation, int(dataset["num_classes"]), run_dir / "evaluation.json")
    ledger = read_json_file(run_dir / "ledger.json")
    if ledger is not None:
        _require(ledger, ("students", "teacher"), run_dir / "ledger.json")
    names = _student_names(run_dir, config, evaluation, ledger)
    return Run(
        path=run_dir,
        config=config,
        config_text=config_text,
        dataset=dataset,
        environment=read_json_file(run_dir / "environment.json"),
        students=[_read_student(run_dir, name) for name in names],
        evaluation=evaluation,
        ledger=ledger,
    )


def last_rows(rows: Iterable[Json], split: str) -> list[Json]:
    """Keep the last row written for each epoch of one split, in epoch order.

    A restart trains an epoch again and writes it again; the later row is the one whose weights survived.

    Args:
        rows: metric rows in the order they were written.
        split: `train`, `val`, `progress` or `coverage`.
    Returns:
        One row an epoch, epochs ascending.

    Example:
        >>> written = [{"split": "val", "epoch": 0, "top1": 0.1}, {"split": "val", "epoch": 0, "top1": 0.2}]
        >>> [row["top1"] for row in last_rows(written, "val")]
        [0.2]
    """
    by_epoch = {int(row["epoch"]): row for row in rows if row["split"] == split}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def parse_metric_lines(text: bytes) -> tuple[list[Json], int]:
    """Read the lines of a `metrics.jsonl` that may still be growing.

    An unfinished last line (no newline yet) is simply not there yet; any other unreadable line, for example
    one cut short by a killed process, is counted.

    Args:
        text: the file's bytes.
    Returns:
        The rows in file order, and how many lines could not be read.

    Example:
        >>> parse_metric_lines(b'{"split": "val", "epoch": 0}\\n{"split": "va')
        ([{'split': 'val', 'epoch': 0}], 0)
    """
    *complete, unfinished = text.split(b"\n")
    parsed = [_parse_row(line) for line in complete if line.strip()]
    tail = _parse_row(unfinished) if unfinished.strip() else None
    rows = [row for row in [*parsed, tail] if row is not None]
    return rows, sum(row is None for row in parsed)


def _parse_row(line: bytes) -> Json | None:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError both are
        return None
    if not isinstance(row, dict) or "split" not in row or "epoch" not in row:
        return None
    return {key: _finite_or_none(value) for key, value in row.items()}


def _read_student(run_dir: Path, name: str) -> Student:
    folder = run_dir / "students" / name
    metrics = folder / "metrics.jsonl"
    rows, num_broken = parse_metric_lines(metrics.read_bytes()) if metrics.is_file() else ([], 0)
    result = read_json_file(folder / "result.json")
    if result is None:
        return Student(name, "unfinished" if rows else "not started", {}, rows, num_broken)
    _require(result, ("status",), folder / "result.json")
    return Student(name, str(result["status"]), result, rows, num_broken)


def _student_names(run_dir: Path, config: Json, evaluation: Json | None, ledger: Json | None) -> list[str]:
    """Collect every student that any file of the run knows, so that none can vanish from the page."""
    folder = run_dir / "students"
    names = {child.name for child in folder.iterdir() if child.is_dir()} if folder.is_dir() else set()
    names |= configured_students(config).keys()
    if evaluation is not None:
        names |= {name for name, entry in evaluation["models"].items() if entry["role"] == "student"}
    if ledger is not None:
        names |= ledger["students"].keys()
    return sorted(names)


def configured_students(config: Json) -> dict[str, Json]:
    """Return the students that the resolved config names: name -> its settings.

    Example:
        >>> configured_students({"students": [{"name": "small", "model": "resnet8"}]})
        {'small': {'name': 'small', 'model': 'resnet8'}}
    """
    return {str(entry["name"]): entry for entry in config.get("students") or []}


def _check_is_run_dir(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise RunError(f"{run_dir} is not a directory; expected a run directory such as runs/<name>")
    missing = [name for name in ("config.yaml", "dataset.json") if not (run_dir / name).is_file()]
    if missing:
        raise RunError(
            f"{run_dir} is not a run directory: it has no {' and no '.join(missing)}. "
            "Give the folder that a run wrote (it holds config.yaml, dataset.json and students/)."
        )


def _check_dataset(dataset: Json, path: Path) -> None:
    _require(dataset, ("name", "classes", "num_classes", "splits"), path)
    _require(dataset["splits"], ("train",), path, "splits")
    _require(dataset["splits"]["train"], ("num_rows", "class_counts"), path, "splits.train")
    num_classes = int(dataset["num_classes"])
    for key, values in (
        ("classes", dataset["classes"]),
        ("splits.train.class_counts", dataset["splits"]["train"]["class_counts"]),
    ):
        if len(values) != num_classes:
            raise RunError(
                f"{path}: {key} has {len(values)} entries but num_classes is {num_classes}; "
                "they must agree. Copy the manifest of the shards again."
            )


def _check_evaluation(evaluation: Json, num_classes: int, path: Path) -> None:
    _require(evaluation, ("split", "num_samples", "models"), path)
    for name, entry in evaluation["models"].items():
        _require(entry, ("role", "metrics"), path, f"models.{name}")
        per_class = entry.get("per_class_accuracy")
        if per_class is not None and len(per_class) != num_classes:
            raise RunError(
                f"{path}: models.{name}.per_class_accuracy has {len(per_class)} entries but dataset.json "
                f"has {num_classes} classes; evaluate this run again."
            )


def _require(mapping: Mapping[str, Any], keys: Iterable[str], path: Path, where: str = "") -> None:
    missing = [f"{where}.{key}" if where else key for key in keys if key not in mapping]
    if missing:
        raise RunError(
            f"{path} has no {', '.join(missing)}; it was written by another version, or by hand. "
            "Run the command that wrote it again."
        )


def _parse_config(text: str, path: Path) -> Json:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{path} is not valid YAML: {error}. Restore the file that the run wrote.") from error
    if not isinstance(config, dict):
        raise RunError(f"{path} holds {type(config).__name__}, expected a mapping of settings.")
    students = config.get("students") or []
    if not isinstance(students, list) or not all(isinstance(e, dict) and "name" in e for e in students):
        raise RunError(f"{path}: students must be a list of entries with a name, as the run wrote it.")
    return config


def read_json_file(path: Path) -> Json | None:
    """Read a JSON object; None where there is no such file, NaN and infinity as None.

    Raises:
        RunError: not valid JSON, or no object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON: {error}. Run the command that wrote it again.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds {type(value).__name__}, expected an object with named entries.")
    cleaned = _finite_or_none(value)
    assert isinstance(cleaned, dict)
    return cleaned


def _finite_or_none(value: Any) -> Any:
    """Turn NaN and infinity into None at any depth: a page shows them as missing, never as a number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return value
