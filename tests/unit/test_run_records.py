"""Answers whether what a run writes about itself is whole and true: run directory, ledger, result.json.

Does not start Ray.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krd_ray.config import Resources, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.errors import RunError
from krd_ray.models.registry import describe_model
from krd_ray.train import students
from krd_ray.train.ledger import build_ledger
from krd_ray.train.loop import WorkerSpec
from krd_ray.train.rundir import MetricsLog, RunDir, StudentDir, environment, read_json, write_json
from krd_ray.train.students import summarise
from tests.unit.run_builders import write_student


def loss_config(**parts: Any) -> LossConfig:
    return LossConfig.model_validate(parts)


# run directory


def test_run_directory_that_was_used_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        run.require()
    run.create()
    run.create()  # nothing has been written yet
    run.config.write_text("name: x\n")
    with pytest.raises(RunError, match="holds a run already; continue it with `krd distill --resume"):
        run.create()
    run.require()


def test_json_is_whole_or_old_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", power_cut)
        with pytest.raises(OSError, match="power cut"):
            write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_half_a_line_of_a_killed_writer_is_left_out_and_cut_off(tmp_path: Path) -> None:
    folder = StudentDir(tmp_path / "s")
    assert (folder.rows(), folder.next_attempt()) == ([], 0)
    MetricsLog(folder, "s", 0).write("train", 0, 5, loss=1.5)
    with folder.metrics.open("a") as file:
        file.write('{"time": 3, "stud')
    assert [row["loss"] for row in folder.rows()] == [1.5]
    assert folder.next_attempt() == 1
    MetricsLog(folder, "s", 1).write("val", 0, 5, many=0.5)
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["split"] for line in lines] == ["train", "val"]
    assert folder.rows()[1] | {"time": 0} == {
        "time": 0, "student": "s", "attempt": 1, "epoch": 0, "step": 5, "split": "val", "many": 0.5,
    }  # fmt: skip


def test_environment_names_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__


# ledger


def stats_row(replica: int, incarnation: int, **more: Any) -> dict[str, Any]:
    summed = dict.fromkeys(
        ["requests", "rows", "hits", "joined", "forward_calls", "padded_rows", "bytes_in", "bytes_out"], 10
    )
    seconds = {"busy_s": 1.0, "cpu_s": 8.0, "process_cpu_s": 10.0, "idle_s": 2.0}
    peaks = {"store_memory_bytes": 7, "store_disk_bytes": 0, "queue_peak_rows": 9, "calibration_forwards": 50}
    names = {"replica": replica, "incarnation": incarnation, "restarted": incarnation > 0}
    return {**names, **summed, **seconds, **peaks, "forwards": 100, "unique_views": 100, **more}


def write_stats(run: RunDir, replica: int, rows: list[dict[str, Any]], tail: str = "") -> None:
    run.teacher.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (run.teacher / f"stats-{replica}.jsonl").write_text(text)


def test_ledger_figures_by_hand(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2)
    write_student(run, "b", epochs=2)
    write_student(run, "alone", epochs=1)
    early = stats_row(0, 0, forwards=1, cpu_s=0.1, queue_peak_rows=20)
    write_stats(run, 0, [early, stats_row(0, 0)], tail='{"half')
    write_stats(run, 1, [stats_row(1, 0), stats_row(1, 1, unique_views=50)])
    ledger = build_ledger(
        run, ["a", "b", "alone"], taught=["a", "b"], driver_bytes={"pixels": 0}, on_cpu=True
    )

    teacher = ledger["teacher"]
    assert (teacher["forwards"], teacher["unique_views"], teacher["rows"]) == (300, 250, 30)
    assert (teacher["replicas"], teacher["restarts"], teacher["queue_peak_rows"]) == (2, 1, 18)
    assert ledger["forwards_per_unique_view"] == pytest.approx(1.2)
    a = ledger["students"]["a"]
    assert (a["samples"], a["compute_s"], a["wait_targets_s"], a["retries"]) == (200, 6.0, 1.5, 2)
    assert (a["epochs"], a["left_out"], a["restarts"]) == (2, 2, 0)

    c_t, c_i = 24 / 300, 4 / 200
    assert ledger["cost_teacher_s_per_sample"] == pytest.approx(c_t)
    assert ledger["cost_student_s_per_sample"] == pytest.approx({"a": c_i, "b": c_i, "alone": c_i})
    gain = 2 * 200 * (c_t + c_i) / (30 + 2 * 6)
    best = 400 * (c_t + c_i) / (250 * c_t + 400 * c_i)
    assert (ledger["A"], ledger["A_star"]) == (pytest.approx(gain), pytest.approx(best))
    assert ledger["eta"] == pytest.approx(gain / best)
    assert ledger["driver_bytes"] == {"pixels": 0}
    on_gpu = build_ledger(run, ["a", "b"], taught=["a", "b"], driver_bytes={}, on_cpu=False)
    assert (on_gpu["A"], on_gpu["A_star"], on_gpu["eta"]) == (None, None, None)


def test_repeated_epochs_count_as_trained_but_their_coverage_counts_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2, attempts=3)
    entry = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)["students"]["a"]
    assert (entry["samples"], entry["epochs"], entry["left_out"]) == (600, 2, 2)
    assert (entry["restarts"], entry["sessions"]) == (1, 2)


def test_ledger_without_teacher_or_samples_claims_no_gain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    ledger = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)
    assert (ledger["teacher"], ledger["A"], ledger["eta"]) == (None, None, None)
    assert ledger["cost_student_s_per_sample"] == {"a": None}
    write_stats(run, 0, [stats_row(0, 0)])
    assert build_ledger(run, ["a"], taught=["a"], driver_bytes={}, on_cpu=True)["A"] is None


# result.json


def worker_spec(run: RunDir, name: str) -> WorkerSpec:
    """Only what `summarise` reads is real."""
    view: Any = type("View", (), {"side": 8})()
    nothing: Any = None
    return WorkerSpec(
        student=name, model="digits_net_4", train=TrainConfig(), loss=loss_config(rrd={"weight": 1}), view=view,
        cycle=None, train_shards=nothing, val_shards=None, class_counts=(5, 4, 3), seed=0, shuffle_seed=0,
        window_rows=1, folder=str(run.student(name).root), session=0, dataset_hash="", num_threads=1, teacher=None,
    )  # fmt: skip


def test_result_sums_up_the_rows_of_a_student(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=3, attempts=2)
    result = summarise(worker_spec(run, "a"), "finished", None)
    info = describe_model("digits_net_4", num_classes=3, image_size=8)
    assert (
        0 <= result.pop("seconds") <= sum(b["time"] - a["time"] for a, b in pairwise(run.student("a").rows()))
    )
    assert result == {
        "student": "a", "model": "digits_net_4", "loss_name": "cross_entropy+rrd", "status": "finished",
        "error": None, "epochs_done": 3, "num_params": info.num_params, "num_flops": info.num_flops,
        "restarts": 1, "images_per_s": 26.0, "wait_frac": 0.25,
    }  # fmt: skip


def test_student_fails_with_whatever_ray_train_raises_and_with_an_end_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def fit(self) -> None:
            if self.error is not None:
                raise self.error

    for name, error, said in (("gone", OSError("storage is gone"), "OSError: storage is gone"),
                              ("empty", None, "training ended without weights")):  # fmt: skip
        monkeypatch.setattr(students, "_trainer", lambda *_, error=error: Trainer(error))
        student = students.StudentRun(worker_spec(RunDir(tmp_path), name), 1, Resources(), 0)
        student.start()
        assert student.finish()["error"] == said
        assert student.state == "failed"


def test_student_that_never_began_has_a_result_too(tmp_path: Path) -> None:
    result = summarise(worker_spec(RunDir(tmp_path), "a"), "failed", "no place")
    assert (result["status"], result["error"], result["epochs_done"]) == ("failed", "no place", 0)
    assert (result["seconds"], result["images_per_s"], result["wait_frac"]) == (0.0, None, None)
