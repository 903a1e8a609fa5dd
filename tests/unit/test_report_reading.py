"""Answers whether a run directory is read as it was written, half-written lines and damaged files included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from krd_ray.errors import RunError
from krd_ray.report import tables
from krd_ray.report.page import build_report
from krd_ray.report.read_run import last_rows, parse_metric_lines, read_run
from krd_ray.report.tables import headline_rows
from tests.unit.report_runs import read_json, write_json, write_run


def test_last_attempt_of_an_epoch_wins(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    metrics = run_dir / "students" / "ce-resnet8" / "metrics.jsonl"
    again = {"split": "val", "epoch": 1, "attempt": 1, "balanced": 0.987, "top1": 0.9}
    with metrics.open("a") as lines:
        lines.write(json.dumps(again) + "\n")
    points = [row for row in tables.curve_rows(read_run(run_dir)) if row["name"] == "ce-resnet8"]
    assert [row["epoch"] for row in points] == [0, 1, 2]
    assert (points[1]["val_balanced"], points[1]["val_top1"]) == (0.987, 0.9)
    assert points[2]["val_balanced"] != 0.987


def test_last_rows_come_in_epoch_order_whatever_the_file_order() -> None:
    rows = [{"split": "train", "epoch": e, "attempt": a} for e, a in ((0, 0), (2, 0), (1, 0), (2, 1), (0, 1))]
    found = last_rows([*rows, {"split": "progress", "epoch": 7, "attempt": 1}], "train")
    assert [(row["epoch"], row["attempt"]) for row in found] == [(0, 1), (1, 0), (2, 1)]


@pytest.mark.parametrize("length", range(1, 42, 8))
def test_half_written_last_line_is_not_there_yet(length: int) -> None:
    whole = b'{"split": "val", "epoch": 0, "top1": 0.5}'
    rows, num_broken = parse_metric_lines(whole + b"\n" + whole[:length])
    assert (len(rows), num_broken) == (2 if length == len(whole) else 1, 0)


def test_line_cut_by_a_killed_process_is_counted_and_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    metrics = run_dir / "students" / "ce-resnet8" / "metrics.jsonl"
    metrics.write_bytes(b'{"split": "va{"split": "val", "epoch": 0}\n' + metrics.read_bytes())
    broken = {row["name"]: row["num_broken_lines"] for row in tables.health_rows(read_run(run_dir))}
    assert broken == {"krd-resnet8": 0, "ce-resnet8": 1}
    assert len(tables.curve_rows(read_run(run_dir))) == 6


def test_nan_is_a_missing_value_not_a_number(tmp_path: Path) -> None:
    rows, _ = parse_metric_lines(b'{"split": "train", "epoch": 0, "loss": NaN, "lr": Infinity}\n')
    assert rows == [{"split": "train", "epoch": 0, "loss": None, "lr": None}]
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    evaluation = read_json(run_dir / "evaluation.json")
    evaluation["models"]["teacher"]["metrics"]["few"] = float("nan")
    write_json(run_dir / "evaluation.json", evaluation)
    assert headline_rows(read_run(run_dir))[0]["few"] is None


def test_folder_that_is_no_run_directory_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no config\.yaml and no dataset\.json"):
        build_report(tmp_path)
    with pytest.raises(RunError, match="is not a directory"):
        build_report(tmp_path / "nowhere")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{"split": "te', r"evaluation\.json is not valid JSON"),
        ("evaluation.json", "[]", r"evaluation\.json holds list"),
        ("evaluation.json", '{"split": "test", "num_samples": 1}', r"evaluation\.json has no models"),
        ("ledger.json", "{}", r"ledger\.json has no students, teacher"),
        ("config.yaml", "a: [", r"config\.yaml is not valid YAML"),
        ("config.yaml", "students: [small]", r"config\.yaml: students must be a list"),
        ("dataset.json", '{"name": "x"}', r"dataset\.json has no classes, num_classes, splits"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    (run_dir / name).write_text(content)
    with pytest.raises(RunError, match=message):
        read_run(run_dir)


def test_per_class_list_of_another_length_is_refused(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    evaluation = read_json(run_dir / "evaluation.json")
    evaluation["models"]["teacher"]["per_class_accuracy"].pop()
    write_json(run_dir / "evaluation.json", evaluation)
    with pytest.raises(RunError, match=r"models\.teacher\.per_class_accuracy has 11 entries .* 12 classes"):
        read_run(run_dir)
