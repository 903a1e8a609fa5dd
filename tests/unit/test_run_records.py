"""Answers whether what a run writes about itself is whole and true: run directory, memory, result.json.

Does not start Ray.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from krd_ray.config import Resources, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.errors import NonFiniteLossError, RunError
from krd_ray.models.registry import describe_model
from krd_ray.teacher.client import ClientStats
from krd_ray.teacher.engine import EngineStats
from krd_ray.teacher.stats import StatsLog, process_memory, read_stats
from krd_ray.train import students
from krd_ray.train.epoch_account import EpochAccount, SharedClock
from krd_ray.train.rundir import MetricsLog, RunDir, StudentDir, environment, read_json, write_json
from krd_ray.train.students import summarise
from krd_ray.train.worker_spec import WorkerSpec
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


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="shared pages are counted on Linux only")
def test_pages_that_others_share_are_not_a_processs_own(tmp_path: Path) -> None:
    path, size = tmp_path / "mapped", 64 << 20
    path.write_bytes(bytes(size))
    before = process_memory()
    mapped = np.memmap(path, np.uint8, "r")
    mapped.max()  # touches every page
    shared = process_memory()
    own = np.ones(size, np.uint8)
    private = process_memory()
    assert shared["rss_bytes"] - before["rss_bytes"] > 0.9 * size
    assert shared["private_bytes"] - before["private_bytes"] < 0.1 * size
    assert private["private_bytes"] - shared["private_bytes"] > 0.9 * size
    del mapped, own


def test_each_line_of_a_teachers_statistics_has_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRay:
        was_current_actor_reconstructed = False

    monkeypatch.setattr("ray.get_runtime_context", NoRay)
    log = StatsLog(tmp_path, "a.0")
    held = np.ones(64 << 20, np.uint8)
    log.write("start", EngineStats())
    del held
    log.write("stats", EngineStats(requests=1))
    first, second = map(json.loads, (tmp_path / "stats-a.0.jsonl").read_text().splitlines())
    assert second["private_bytes"] < first["private_bytes"] - (50 << 20)
    assert second["private_bytes_peak"] == first["private_bytes_peak"] == first["private_bytes"]
    assert 0 < second["private_bytes"] < second["rss_bytes"]
    assert [row["requests"] for row in read_stats(tmp_path)] == [1]


def account_of(rank: int, world: int) -> dict[str, float]:
    """The values of an epoch of one step, 3 rows on rank 0 and 5 on rank 1."""
    account = EpochAccount(ClientStats, world, SharedClock(1))
    account.add(3 + 2 * rank, {"loss": 1.0 + rank}, 0.5)
    return account.total(torch.device("cpu"))


def one_rank(rank: int, folder: Path) -> None:
    held = np.ones((64 << 20) * rank, np.uint8)  # the second rank is the larger one
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    write_json(folder / f"{rank}.json", {"own": process_memory(), "total": account_of(rank, 2)})
    dist.destroy_process_group()
    del held


@pytest.mark.skipif(sys.platform != "linux", reason="forks, which is quick, and safe on Linux only")
def test_ranks_add_up_but_memory_is_that_of_the_largest(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_rank, args=(rank, tmp_path), daemon=True) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    for key in ("rss_bytes", "private_bytes"):
        assert first["total"][key] == second["total"][key] == pytest.approx(second["own"][key], rel=0.1)
        assert second["own"][key] > first["own"][key] + (50 << 20)
    assert (first["total"]["num_samples"], first["total"]["step_cpu_s"]) == (8, 1.0)
    assert first["total"]["loss"] == pytest.approx((3 * 1.0 + 5 * 2.0) / 8)


def test_memory_of_a_lone_worker_is_its_own() -> None:
    values = account_of(0, 1)
    assert values["private_bytes"] == pytest.approx(process_memory()["private_bytes"], rel=0.1)
    assert "rss_bytes" not in EpochAccount(ClientStats, 1, SharedClock(1)).so_far()


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


def test_student_fails_with_whatever_its_workers_raise_and_with_an_end_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, error, said in (("gone", OSError("storage is gone"), "OSError: storage is gone"),
                              ("empty", None, "training ended without weights")):  # fmt: skip

        def train(*_: object, error: Exception | None = error) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(students, "train_students", train)
        run = students.StudentsRun([worker_spec(RunDir(tmp_path), name)], 1, Resources(), 0)
        run.start()
        assert run.finish()[0]["error"] == said
        assert run.states() == {name: "failed"}


def test_students_of_a_process_that_crashed_have_failed_but_for_those_that_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    specs = [worker_spec(run, name) for name in ("done", "wild", "open")]

    def train(*_: object) -> None:
        run.student("done").weights.touch()
        run.student("wild").write_error(NonFiniteLossError("not finite"))
        raise OSError("node is gone")

    monkeypatch.setattr(students, "train_students", train)
    together = students.StudentsRun(specs, 1, Resources(), 0)
    assert together.states() == dict.fromkeys(("done", "wild", "open"), "waiting")
    together.start()
    assert [result["error"] for result in together.finish()] == [None, "not finite", "OSError: node is gone"]
    assert together.states() == {"done": "finished", "wild": "failed", "open": "failed"}


def test_files_that_did_not_come_fail_whoever_has_no_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    specs = [worker_spec(run, name) for name in ("wild", "done")]
    calls = iter([None, OSError("bucket is gone")])

    def train(*_: object) -> None:
        run.student("done").weights.touch()
        run.student("wild").write_error(NonFiniteLossError("not finite"))

    def sync() -> None:
        if error := next(calls):
            raise error

    monkeypatch.setattr(students, "train_students", train)
    together = students.StudentsRun(specs, 1, Resources(), 0, sync=sync)
    together.start()
    assert [result["error"] for result in together.finish()] == ["not finite", "OSError: bucket is gone"]


def test_a_process_shares_out_what_is_no_step_evenly() -> None:
    clock = SharedClock(2)
    first, second = (EpochAccount(ClientStats, 1, clock) for _ in range(2))
    first.add(4, {"loss": 1.0}, 3.0)
    second.add(4, {"loss": 1.0}, 1.0)
    one, two = first.so_far(), second.so_far()
    assert (one["step_cpu_s"], two["step_cpu_s"]) == (3.0, 1.0)
    # The process has really taken next to nothing: less than its "steps", and each is given half of the difference.
    assert one["cpu_s"] == pytest.approx(3.0 - 2.0, abs=0.1)
    assert two["cpu_s"] == pytest.approx(1.0 - 2.0, abs=0.1)


def test_student_that_never_began_has_a_result_too(tmp_path: Path) -> None:
    result = summarise(worker_spec(RunDir(tmp_path), "a"), "failed", "no place")
    assert (result["status"], result["error"], result["epochs_done"]) == ("failed", "no place", 0)
    assert (result["seconds"], result["images_per_s"], result["wait_frac"]) == (0.0, None, None)
