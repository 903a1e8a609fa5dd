"""Whole runs as a user starts them: several students, several workers, ledger, evaluation, report, repetition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import krd, rows_of

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `krd demo` printed, and its run directory."""
    out = tmp_path_factory.mktemp("demo")
    done = krd("demo", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, next(out.glob("2*/students"))


def test_demo_prints_the_table_and_the_path_of_a_report_with_pictures(demo: tuple[str, Path]) -> None:
    printed, run = demo
    for name in ("teacher", "krd-4", "krd-8", "krd-16", "ce-4", "ce-8", "ce-16"):
        assert name in printed
    assert str(run / "report/index.html") in printed
    assert len(list((run / "report").glob("*.png"))) == len(list((run / "report").glob("*.csv"))) - 1


def test_three_students_cost_one_forward_per_unique_view_and_nothing_passes_the_driver(
    demo: tuple[str, Path],
) -> None:
    ledger = json.loads((demo[1] / "ledger.json").read_text())
    num_train = json.loads((demo[1] / "dataset.json").read_text())["splits"]["train"]["num_rows"]
    assert ledger["forwards_per_unique_view"] == 1.0
    assert ledger["teacher"]["forwards"] == 40 * num_train
    assert ledger["teacher"]["rows"] == 3 * 40 * num_train
    assert ledger["driver_bytes"] == {"pixels": 0, "targets": 0}
    assert ledger["students"]["ce-4"]["requests"] == 0
    assert 0 < ledger["eta"] <= 1.1


def test_rectified_targets_help_the_few_shot_classes_of_the_demo(demo: tuple[str, Path]) -> None:
    models = json.loads((demo[1] / "evaluation.json").read_text())["models"]
    for size in (4, 8, 16):
        assert models[f"krd-{size}"]["metrics"]["few"] > models[f"ce-{size}"]["metrics"]["few"] + 0.1


def test_the_test_split_is_read_once(demo: tuple[str, Path]) -> None:
    written = (demo[1] / "evaluation.json").stat().st_mtime_ns
    done = krd("evaluate", demo[1])
    assert done.returncode == 0, done.stderr
    assert "krd-16" in done.stdout
    assert (demo[1] / "evaluation.json").stat().st_mtime_ns == written


def test_two_workers_see_each_sample_once_and_the_resolved_config_repeats_the_run_cached_or_streamed(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    students = [
        {"name": "pair", "model": "digits_net_4", "workers": 2, "resources": {"num_cpus": 0.25}},
        {"name": "alone", "model": "digits_net_8", "train": {"batch_size": 48}},
    ]
    first = krd("distill", distill_config(students))
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "run"
    num_train = json.loads((run / "dataset.json").read_text())["splits"]["train"]["num_rows"]
    assert num_train % 2 == 1  # so that two workers must leave one sample out
    pair = rows_of(run, "pair", "coverage")
    assert [(row["missed"], row["doubled"], row["seen"]) for row in pair] == [(0, 0, num_train - 1)] * 4
    assert len({tuple(row["left_out_ids"]) for row in pair}) == 4
    alone = rows_of(run, "alone", "coverage")
    assert [(row["missed"], row["doubled"], row["seen"]) for row in alone] == [(0, 0, num_train)] * 4
    assert json.loads((run / "ledger.json").read_text())["forwards_per_unique_view"] == 1.0

    settings = (
        f"run_dir={tmp_path / 'again'}",
        "data.cache=stream",
        "students.pair.workers=1",
        "ray.num_cpus=3",
    )
    again = krd(
        "distill", run / "config.yaml", *(word for setting in settings for word in ("--set", setting))
    )
    assert again.returncode == 0, again.stdout + again.stderr
    losses = [[row["loss"] for row in rows_of(root, "alone", "train")] for root in (run, tmp_path / "again")]
    assert losses[0] == losses[1]
    assert rows_of(run, "alone", "val")[-1]["loss"] == rows_of(tmp_path / "again", "alone", "val")[-1]["loss"]
