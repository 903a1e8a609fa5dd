"""Students that share a process train as they would alone, ask the teacher once, and fail alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from krd_ray.config_loss import LossConfig
from krd_ray.teacher.ports import TeacherLink
from krd_ray.teacher.stats import read_stats
from krd_ray.train.rundir import StudentDir
from krd_ray.train.worker_spec import WorkerSpec
from tests.ray_tier.student_runs import epochs_of, kill_after, named, rows_of, run_of, train, weights_of

PLAIN = LossConfig.model_validate({"kd": {"weight": 1.0}})
DROPS_OUT = "torchvision:mobilenet_v3_small"


def losses_of(spec: WorkerSpec) -> dict[int, float]:
    """By epoch; one that was trained again counts once more, and must come out the same."""
    found = [(row["epoch"], row["loss"]) for row in rows_of(spec, "train")]
    assert len(set(found)) == len(dict(found))
    return dict(found)


def assert_same(left: WorkerSpec, right: WorkerSpec) -> None:
    assert losses_of(left) == losses_of(right)
    first, second = weights_of(left), weights_of(right)
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_students_train_to_the_bit_as_alone_and_the_teacher_is_asked_once_per_form(
    spec: WorkerSpec, served: Any
) -> None:
    spec = replace(named(spec, "x", epochs=3), seed=11, shuffle_seed=11)
    kinds = {
        "rectified": spec,
        "plain": replace(spec, loss=PLAIN),
        "dropping": replace(spec, loss=PLAIN, model=DROPS_OUT),
    }
    alone = [named(kind, f"alone-{name}") for name, kind in kinds.items()]
    together = [named(kind, f"together-{name}") for name, kind in kinds.items()]
    before = served[0].stats()[0]
    assert {result["status"] for result in train(run_of(*together))} == {"finished"}
    after = served[0].stats()[0]
    assert {result["status"] for result in train(*map(run_of, alone))} == {"finished"}
    for left, right in zip(alone, together, strict=True):
        assert_same(left, right)
    samples = sum(row["num_samples"] for row in rows_of(together[0], "train"))
    assert after["rows"] - before["rows"] == 2 * samples, "three students, two forms of targets"
    forwards = after["forwards"] - before["forwards"]  # other tests may have asked for these views before
    assert forwards == after["unique_views"] - before["unique_views"] <= samples
    starts = [row for student in together for row in rows_of(student, "start")]
    assert len({row["pid"] for row in starts}) == 1
    assert {tuple(row["process"]) for row in starts} == {tuple(student.student for student in together)}


def test_what_a_process_does_once_is_counted_once(spec: WorkerSpec) -> None:
    first, second = named(spec, "first", epochs=2), named(spec, "second", epochs=2)
    train(run_of(first, second))
    for one, two in zip(rows_of(first, "train"), rows_of(second, "train"), strict=True):
        assert one["requests"] > 0 == two["requests"]
        assert one["bytes_received"] > 0 == two["bytes_received"]
        assert one["wait_targets_s"] == pytest.approx(two["wait_targets_s"], abs=0.02)
        rest = [row["cpu_s"] - row["step_cpu_s"] for row in (one, two)]
        assert rest[0] == pytest.approx(rest[1], abs=0.02)
    for row in rows_of(second, "coverage"):
        assert (row["missed"], row["doubled"]) == (0, 0)


def test_one_that_diverges_and_one_that_is_stopped_leave_the_others_to_go_on_also_after_a_kill(
    spec: WorkerSpec,
) -> None:
    steady, wild, stopped = named(spec, "steady"), named(spec, "wild", lr=1e30), named(spec, "stopped")
    folder = StudentDir(Path(stopped.folder))

    kill = kill_after(6, steady)

    def stop_after_two(states: dict[str, str]) -> None:
        if len(epochs_of(stopped)) >= 2:
            folder.stop.touch()
        kill(states)

    run = run_of(wild, steady, stopped)
    results = train(run, tick=stop_after_two)
    assert run.states() == {"wild": "failed", "steady": "finished", "stopped": "stopped"}
    assert results[0]["error"].startswith("student wild, rank 0: the loss is not finite at epoch")
    assert len(kill.killed) == 1
    assert [result["restarts"] for result in results] == [0, 1, 0], "who has ended is not started again"
    assert not StudentDir(Path(wild.folder)).weights.exists()
    assert not folder.weights.exists()
    train(run_of(alone := named(spec, "alone")))
    assert_same(alone, steady)


def test_after_a_kill_all_go_on_from_their_own_last_checkpoints(spec: WorkerSpec) -> None:
    often, seldom = named(spec, "often"), named(spec, "seldom", checkpoint_every_epochs=2)
    tick = kill_after(4, often)
    results = train(run_of(often, seldom), tick=tick)
    assert len(tick.killed) == 1
    assert [(result["status"], result["restarts"]) for result in results] == [("finished", 1)] * 2
    resumed = [row["epoch"] for student in (often, seldom) for row in rows_of(student, "start")[1:]]
    assert resumed[0] >= resumed[1] >= resumed[0] - 2
    train(run_of(alone := named(spec, "alone")), run_of(other := named(spec, "other")))
    assert_same(alone, often)
    assert_same(other, seldom)


def test_two_workers_of_two_students(spec: WorkerSpec) -> None:
    pair = [
        replace(named(spec, name, epochs=2), loss=loss) for name, loss in (("a", spec.loss), ("b", PLAIN))
    ]
    apart = [replace(each, student=f"{each.student}-apart", folder=f"{each.folder}-apart") for each in pair]
    train(run_of(*pair, workers=2))
    train(*(run_of(each, workers=2) for each in apart))
    for left, right in zip(apart, pair, strict=True):
        assert_same(left, right)


def test_a_teacher_inside_the_process_forwards_once_for_all(
    spec: WorkerSpec, teachers: Any, served: Any, tmp_path: Path
) -> None:
    (inside,) = teachers.specs(tmp_path)
    trained = served[0]._specs[0].calibration
    link = TeacherLink("in_process", served[1], 64, 60.0, spec=replace(inside, calibration=trained))
    pair = [replace(named(spec, name, epochs=2), teacher=link) for name in ("a", "b")]
    assert {result["status"] for result in train(run_of(*pair))} == {"finished"}
    (stats,) = read_stats(tmp_path / "teacher")
    samples = sum(row["num_samples"] for row in rows_of(pair[0], "train"))
    assert (stats["replica"], stats["forwards"], stats["rows"]) == ("a.0", samples, samples)
