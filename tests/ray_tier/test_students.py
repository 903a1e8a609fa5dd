"""Students train at the same time, fail alone, and go on after kill -9 as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from safetensors.torch import load_file

from krd_ray.config import SamplerConfig
from krd_ray.teacher.messages import RECEIVED_BYTES
from krd_ray.teacher.window import LARGEST
from krd_ray.train.rundir import StudentDir
from krd_ray.train.students import run_together
from krd_ray.train.worker_spec import WorkerSpec
from tests.ray_tier.student_runs import (
    EPOCHS,
    TICK_S,
    WORKERS,
    epochs_of,
    kill_after,
    named,
    ray_processes,
    run_of,
)


def test_students_fail_alone_and_a_killed_one_ends_with_the_weights_of_an_undisturbed_one(
    spec: WorkerSpec,
) -> None:
    steady, wild, killed = named(spec, "steady"), named(spec, "wild", lr=1e30), named(spec, "killed")
    before = dict(RECEIVED_BYTES)
    dying = {pid for pid, line in ray_processes() if not line.startswith("ray::IDLE")}  # of a test before
    together, seen = [run_of(steady), run_of(wild)], set()
    run_together(
        together,
        lambda _: seen.update(line for pid, line in ray_processes() if pid not in dying),
        TICK_S,
    )
    assert {line.split(".")[0] for line in seen} & WORKERS == {"ray::TrainWorker"}
    assert not [line for line in seen if "Controller" in line or "SynchronizationActor" in line]
    good, bad = (result for run in together for result in run.finish())
    assert (good["status"], good["error"], good["epochs_done"]) == ("finished", None, EPOCHS)
    assert bad["status"] == "failed"
    assert bad["error"].startswith("student wild, rank 0: the loss is not finite at epoch")
    assert not StudentDir(Path(wild.folder)).weights.exists()

    tick = kill_after(3, killed)
    run_together([run := run_of(killed)], tick, TICK_S)
    (result,) = run.finish()
    assert len(tick.killed) == 1
    assert (result["status"], result["restarts"], result["epochs_done"]) == ("finished", 1, EPOCHS)
    assert sorted(set(epochs_of(killed))) == list(range(EPOCHS))
    resumed_at = min(row["epoch"] for row in StudentDir(Path(killed.folder)).rows() if row["attempt"] == 1)
    assert 3 <= resumed_at <= 4, "from its last checkpoint, not from an earlier one"
    left, right = (load_file(StudentDir(Path(s.folder)).weights) for s in (steady, killed))
    assert left.keys() == right.keys()
    assert all((left[key] == right[key]).all() for key in left)
    assert before == RECEIVED_BYTES, "neither pixels nor targets pass through the driver"


def test_students_stand_back_behind_their_teacher(spec: WorkerSpec, served: Any) -> None:
    group, _ = served
    teacher = psutil.Process(ray.get(group.replicas[0].info.remote()).pid).nice()
    short, equal = named(spec, "short", epochs=1), named(spec, "equal", epochs=1, niceness=0)
    run_together([run_of(short), run_of(equal)], lambda _: None, TICK_S)
    found = [
        row["niceness"]
        for student in (short, equal)
        for row in StudentDir(Path(student.folder)).rows()
        if row["split"] == "start"
    ]
    assert found == [min(teacher + 10, 19), teacher]


def test_a_student_that_finds_no_room_on_its_disk_fails_once_and_names_the_file(spec: WorkerSpec) -> None:
    full = named(spec, "full")
    folder = StudentDir(Path(full.folder))
    folder.root.mkdir(parents=True)
    folder.metrics.symlink_to("/dev/full")  # every write to it says that the disk is full
    run_together([run := run_of(full)], lambda _: None, TICK_S)
    (result,) = run.finish()
    assert (result["status"], result["epochs_done"]) == ("failed", 0)
    assert result["error"].startswith(
        f"cannot write {folder.metrics}: No space left on device; free space there"
    )


def test_two_workers_share_an_epoch_and_count_every_sample(spec: WorkerSpec, digits: Any) -> None:
    pair = named(spec, "pair", epochs=2)
    run_together([run := run_of(pair, workers=2)], lambda _: None, TICK_S)
    assert run.finish()[0]["status"] == "finished"
    rows = StudentDir(Path(pair.folder)).rows()
    train = [row for row in rows if row["split"] == "train"]
    num_rows = digits.raw.num_rows
    assert [row["num_samples"] for row in train] == [num_rows - num_rows % 2] * 2
    val = [row for row in rows if row["split"] == "val"]
    assert {row["num_samples"] for row in val} == {digits.val.num_rows}


def test_two_workers_that_are_asked_to_stop_end_together_and_export_nothing(
    spec: WorkerSpec, digits: Any, served: Any
) -> None:
    pair = named(spec, "stopped", epochs=200)
    before = served[0].stats()[0]["rows"]
    folder = StudentDir(Path(pair.folder))

    def stop_after_an_epoch(_: dict[str, str]) -> None:
        if epochs_of(pair):
            folder.stop.touch()

    run_together([run := run_of(pair, workers=2)], stop_after_an_epoch, TICK_S)
    assert run.states() == {"stopped": "stopped"}
    (result,) = run.finish()
    assert (result["status"], result["error"], result["restarts"]) == ("stopped", None, 0)
    assert 1 <= result["epochs_done"] < 200
    asked_ahead = 2 * LARGEST * pair.train.batch_size
    asked = served[0].stats()[0]["rows"] - before
    assert asked <= result["epochs_done"] * digits.raw.num_rows + asked_ahead, (
        "nothing is asked for after the end"
    )
    assert not folder.weights.exists()


def test_two_workers_train_the_copies_of_a_deferred_sampler_and_ask_once_for_each(
    spec: WorkerSpec, digits: Any, served: Any
) -> None:
    pair = named(spec, "sampled", epochs=3, sampler=SamplerConfig(name="class_balanced", from_epoch=1))
    pair = replace(pair, seed=9, shuffle_seed=9, cycle=4)
    before = served[0].stats()[0]
    run_together([run := run_of(pair, workers=2)], lambda _: None, TICK_S)
    assert run.finish()[0]["status"] == "finished"
    rows = StudentDir(Path(pair.folder)).rows()
    train, covered = ([row for row in rows if row["split"] == split] for split in ("train", "coverage"))
    assert [(row["missed"], row["doubled"]) for row in covered] == [(0, 0)] * 3
    num_rows = digits.raw.num_rows
    assert train[0]["num_samples"] == num_rows - num_rows % 2 == covered[0]["seen"]
    for row, coverage in zip(train[1:], covered[1:], strict=True):
        assert coverage["seen"] < 0.8 * num_rows, "much of the head has no turn"
        assert row["num_samples"] == pytest.approx(num_rows, rel=0.1)
        assert row["num_samples"] % 2 == 0
    steps = [row["step"] for row in train]
    assert steps == np.cumsum([-(-row["num_samples"] // 2 // 32) for row in train]).tolist()
    after = served[0].stats()[0]
    assert after["forwards"] - before["forwards"] == after["unique_views"] - before["unique_views"]
    asked = sum(row["num_samples"] for row in train)
    assert after["rows"] - before["rows"] == asked
