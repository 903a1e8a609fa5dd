"""Students train at the same time, fail alone, and go on after kill -9 as if nothing had happened."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from safetensors.torch import load_file

from krd_ray.config import Resources, SamplerConfig, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.shard_set import ShardSet
from krd_ray.teacher.messages import RECEIVED_BYTES
from krd_ray.teacher.ports import TeacherLink
from krd_ray.train.loop import WorkerSpec
from krd_ray.train.rundir import StudentDir
from krd_ray.train.students import StudentRun, run_together

EPOCHS = 12
TICK_S = 0.02
WORKERS = {"ray::TrainWorker", "ray::RayTrainWorker"}


@pytest.fixture
def spec(digits: Any, cached: ShardSet, served: Any, tmp_path: Path) -> WorkerSpec:
    """A small student that learns rectified logits and features from the served teacher."""
    group, teacher_hash = served
    return WorkerSpec(
        student="small",
        model="digits_net_4",
        train=TrainConfig(epochs=EPOCHS, batch_size=32, lr=0.05, precision="fp32", channels_last=False),
        loss=LossConfig.model_validate({"rrd": {"weight": 1.0}, "lrd": {"weight": 1.0}}),
        view=digits.view,
        cycle=None,
        train_shards=cached,
        val_shards=digits.val,
        class_counts=digits.class_counts,
        seed=5,
        shuffle_seed=3,
        window_rows=1000,
        folder=str(tmp_path / "small"),
        session=0,
        dataset_hash="0",
        num_threads=1,
        teacher=TeacherLink(
            "actors", teacher_hash, 64, 60.0, replicas=tuple(group.replicas), has_pixels=True
        ),
    )


def named(spec: WorkerSpec, name: str, **train: Any) -> WorkerSpec:
    folder = Path(spec.folder).with_name(name)
    return replace(spec, student=name, folder=str(folder), train=spec.train.model_copy(update=train))


def run_of(spec: WorkerSpec, workers: int = 1) -> StudentRun:
    return StudentRun(spec, workers, Resources(num_cpus=0.25), max_failures=2)


def epochs_of(spec: WorkerSpec) -> list[int]:
    return [row["epoch"] for row in StudentDir(Path(spec.folder)).rows() if row["split"] == "coverage"]


def ray_processes() -> list[tuple[int, str]]:
    """Pid and command line of what the raylet of this process's session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append((process.pid, " ".join(process.cmdline())))
    return [(pid, line) for pid, line in found if line.startswith("ray::")]


def train_worker_pids() -> list[int]:
    """Processes of this cluster that train."""
    return [pid for pid, line in ray_processes() if line.split(".")[0] in WORKERS]


def kill_after(epochs: int, spec: WorkerSpec) -> Any:
    """A tick that kills the one training process once it has finished that many epochs."""
    killed: list[int] = []

    def tick(_: dict[str, str]) -> None:
        if not killed and len(epochs_of(spec)) >= epochs:
            (pid,) = train_worker_pids()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    tick.killed = killed  # type: ignore[attr-defined]
    return tick


def test_students_fail_alone_and_a_killed_one_ends_with_the_weights_of_an_undisturbed_one(
    spec: WorkerSpec,
) -> None:
    steady, wild, killed = named(spec, "steady"), named(spec, "wild", lr=1e30), named(spec, "killed")
    before = dict(RECEIVED_BYTES)
    together, seen = [run_of(steady), run_of(wild)], set()
    run_together(together, lambda _: seen.update(line for _, line in ray_processes()), TICK_S)
    assert {line.split(".")[0] for line in seen} & WORKERS == {"ray::TrainWorker"}
    assert not [line for line in seen if "Controller" in line or "SynchronizationActor" in line]
    good, bad = (run.finish() for run in together)
    assert (good["status"], good["error"], good["epochs_done"]) == ("finished", None, EPOCHS)
    assert bad["status"] == "failed"
    assert bad["error"].startswith("student wild, rank 0: the loss is not finite at epoch")
    assert not StudentDir(Path(wild.folder)).weights.exists()

    tick = kill_after(3, killed)
    run_together([run := run_of(killed)], tick, TICK_S)
    result = run.finish()
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
    result = run.finish()
    assert (result["status"], result["epochs_done"]) == ("failed", 0)
    assert result["error"].startswith(
        f"cannot write {folder.metrics}: No space left on device; free space there"
    )


def test_two_workers_share_an_epoch_and_count_every_sample(spec: WorkerSpec, digits: Any) -> None:
    pair = named(spec, "pair", epochs=2)
    run_together([run := run_of(pair, workers=2)], lambda _: None, TICK_S)
    assert run.finish()["status"] == "finished"
    rows = StudentDir(Path(pair.folder)).rows()
    train = [row for row in rows if row["split"] == "train"]
    num_rows = digits.raw.num_rows
    assert [row["num_samples"] for row in train] == [num_rows - num_rows % 2] * 2
    val = [row for row in rows if row["split"] == "val"]
    assert {row["num_samples"] for row in val} == {digits.val.num_rows}


def test_two_workers_that_are_asked_to_stop_end_together_and_export_nothing(spec: WorkerSpec) -> None:
    pair = named(spec, "stopped", epochs=200)
    folder = StudentDir(Path(pair.folder))

    def stop_after_an_epoch(_: dict[str, str]) -> None:
        if epochs_of(pair):
            folder.stop.touch()

    run_together([run := run_of(pair, workers=2)], stop_after_an_epoch, TICK_S)
    assert run.state == "stopped"
    result = run.finish()
    assert (result["status"], result["error"], result["restarts"]) == ("stopped", None, 0)
    assert 1 <= result["epochs_done"] < 200
    assert not folder.weights.exists()


def test_two_workers_train_the_copies_of_a_deferred_sampler_and_ask_once_for_each(
    spec: WorkerSpec, digits: Any, served: Any
) -> None:
    pair = named(spec, "sampled", epochs=3, sampler=SamplerConfig(name="class_balanced", from_epoch=1))
    pair = replace(pair, seed=9, shuffle_seed=9, cycle=4)
    before = served[0].stats()[0]
    run_together([run := run_of(pair, workers=2)], lambda _: None, TICK_S)
    assert run.finish()["status"] == "finished"
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
