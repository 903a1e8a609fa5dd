"""Answers whether a plan balances a machine, says what sharing saves and warns where it saves nothing.

Does not start Ray; costs are given, and measured once, on digits.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from krd_ray.cli import app
from krd_ray.config_io import parse_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.models.registry import build_model
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.costs import Cost, count_views, measure_costs
from krd_ray.train.epoch_rows import EpochRows, RowSettings
from krd_ray.train.plan_warnings import plan_warnings
from krd_ray.train.plan_work import Machine, RunWork, StudentWork, TeacherWork
from krd_ray.train.planner import Plan, make_plan
from krd_ray.train.prepare import Prepared, prepare
from tests.unit.run_builders import raw_run

ROWS = 1000
TWO_CORES = Machine(2.0)


def work_of(
    c_t: float | None, costs: list[float], *, epochs: int = 4, cycle: int | None = None, **teacher: Any
) -> RunWork:
    """Students s0, s1, ... that all learn from one teacher, each epoch of new views unless there is a cycle."""
    students = tuple(
        StudentWork(f"s{k}", "net", Cost(cost, "cpu", 1), epochs) for k, cost in enumerate(costs)
    )
    views = ROWS * min(epochs, cycle or epochs)
    given = None if c_t is None else TeacherWork(Cost(c_t, "cpu", 1), views, **teacher)
    return RunWork(given, students, ROWS, cycle)


def cores_of(plan: Plan) -> float:
    return sum(share.amount for share in plan.shares)


@pytest.mark.parametrize(
    ("c_t", "costs"), [(4.0, [1.0] * 4), (1.0, [2.0, 1.0]), (16.0, [1.0, 0.5, 0.25]), (0.5, [3.0] * 8)]
)
@pytest.mark.parametrize("cores", [2.0, 8.0])
def test_all_advance_in_step_and_keep_every_core_busy(c_t: float, costs: list[float], cores: float) -> None:
    plan = make_plan(work_of(c_t, costs), Machine(cores))
    assert plan.teacher is not None
    assert cores_of(plan) == pytest.approx(cores)
    assert plan.rate == pytest.approx(cores / (c_t + sum(costs)))
    for share, cost in zip(plan.students, costs, strict=True):
        assert share.amount / cost == pytest.approx(plan.rate)
    assert plan.teacher.amount / c_t == pytest.approx(plan.rate)  # one forward per image serves all of them
    assert plan.epoch_s == pytest.approx(ROWS / plan.rate)


@pytest.mark.parametrize("reading", [0.0, 0.5])
@pytest.mark.parametrize("costs", [[1.0] * 4, [3.0, 0.2]])
def test_what_runs_together_fits_the_machine(costs: list[float], reading: float) -> None:
    machine = Machine(2.0, reading_cpus=reading)
    plan = make_plan(work_of(4.0, costs), machine)
    wanted = sum(share.processes * share.reserved for share in plan.shares)
    assert wanted <= machine.cores - reading + 1e-9
    assert wanted >= machine.cores - reading - 0.01 * len(plan.shares) - 1e-9  # rounded down, not thrown away


def test_bound_is_the_ledgers() -> None:
    work = work_of(4.0, [1.0] * 4)
    assert work.a_star == pytest.approx((4 * 4 + 4) / (4 + 4))
    assert work_of(4.0, [1.0]).a_star == pytest.approx(1.0)
    cycled = work_of(4.0, [1.0], epochs=8, cycle=2)
    assert cycled.a_star == pytest.approx((4 + 1) / (4 * 2 / 8 + 1))


def test_one_student_with_fresh_views_gets_the_teacher_inside() -> None:
    work = work_of(4.0, [1.0])
    plan = make_plan(work, TWO_CORES)
    assert plan.placement == "in_process"
    assert plan.teacher is None
    assert "teacher.placement=in_process" in plan.settings
    assert plan.rate == pytest.approx(2.0 / 5.0)
    assert "gains nothing from a shared teacher" in plan_warnings(work, plan)[0]


def test_several_students_share_it_even_where_the_config_gives_each_its_own() -> None:
    work = work_of(4.0, [1.0, 1.0], placement="in_process")
    plan = make_plan(work, TWO_CORES)
    assert plan.placement == "actors"
    assert "teacher.placement=actors" in plan.settings
    assert any("a teacher of its own" in line for line in plan_warnings(work, plan))


def test_students_that_share_a_process_are_planned_as_one_and_keep_a_teacher_inside_it() -> None:
    apart, costs = work_of(4.0, [1.0, 3.0]), [1.0, 3.0]
    pair = StudentWork(
        "s0, s1",
        "net",
        Cost(sum(costs), "cpu", 1),
        4,
        settings=("students.s0", "students.s1"),
        num_students=2,
    )
    work = replace(apart, students=(pair,))
    assert work.a_star == apart.a_star
    plan = make_plan(work, TWO_CORES)
    assert (plan.placement, plan.at_once, plan.rate) == ("actors", 2, make_plan(apart, TWO_CORES).rate)
    assert "students.s0.resources.num_cpus=1" in plan.settings
    assert "students.s1.resources.num_cpus=1" in plan.settings
    inside = replace(work, teacher=replace(work.teacher, placement="in_process"))  # type: ignore[type-var]
    assert make_plan(inside, TWO_CORES).placement == "in_process"
    assert not any(
        "teacher of its own" in line for line in plan_warnings(inside, make_plan(inside, TWO_CORES))
    )


def test_students_reserve_alike_where_some_share_a_process_and_start_as_a_whole() -> None:
    work = work_of(1.0, [2.0, 1.0])
    pair = StudentWork(
        "a, b", "net", Cost(3.0, "cpu", 1), 4, settings=("students.a", "students.b"), num_students=2
    )
    work = replace(work, students=(*work.students, pair), at_once=3)
    plan = make_plan(work, Machine(8.0))
    assert plan.at_once == 3, "the pair and the heaviest other one"
    reserved = {text.split("num_cpus=")[1] for text in plan.settings if text.startswith("students.")}
    assert len(reserved) == 1


def test_a_filled_store_takes_no_core() -> None:
    plan = make_plan(work_of(4.0, [1.0, 1.0], placement="stored"), TWO_CORES)
    assert plan.teacher is None
    assert plan.rate == pytest.approx(1.0)


def test_a_cheap_teacher_is_said_not_to_be_worth_sharing() -> None:
    work = work_of(0.01, [1.0, 1.0])
    assert any("sharing saves" in line for line in plan_warnings(work, make_plan(work, TWO_CORES)))
    work = work_of(4.0, [1.0] * 4)
    assert plan_warnings(work, make_plan(work, TWO_CORES)) == []


def test_a_student_with_fixed_threads_holds_the_others_back_and_is_named() -> None:
    work = work_of(1.0, [4.0, 1.0])
    slow = replace(work.students[0], fixed_threads=1)
    work = replace(work, students=(slow, work.students[1]))
    plan = make_plan(work, Machine(16.0))
    assert plan.rate == pytest.approx(1 / 4.0)
    assert cores_of(plan) < 16.0
    assert any(line.startswith("s0 holds the others back") for line in plan_warnings(work, plan))


def test_fixed_threads_take_step_and_teacher_one_after_the_other_where_it_lives_inside() -> None:
    work = work_of(4.0, [1.0], placement="in_process")
    work = replace(work, students=(replace(work.students[0], fixed_threads=1),))
    plan = make_plan(work, TWO_CORES)
    assert plan.rate == pytest.approx(1 / 5.0)
    assert cores_of(plan) == pytest.approx(1.0)
    assert any(line.startswith("s0 holds the others back") for line in plan_warnings(work, plan))


def test_replicas_are_enough_for_a_dear_teacher() -> None:
    work = work_of(16.0, [1.0] * 4, fixed_threads=1)
    plan = make_plan(work, Machine(8.0))
    assert plan.teacher is not None
    assert plan.teacher.processes == math.ceil(plan.teacher.amount)
    assert plan.teacher.processes == 7
    assert "teacher.replicas=7" in plan.settings


def test_students_that_take_turns_are_planned_by_the_heaviest() -> None:
    work = replace(work_of(4.0, [1.0, 3.0, 2.0]), at_once=2)
    plan = make_plan(work, TWO_CORES)
    assert plan.at_once == 2
    assert plan.rate == pytest.approx(2.0 / (4 + 3 + 2))
    assert len(plan.students) == 3


def test_a_store_too_small_for_what_is_asked_again_is_warned_of() -> None:
    work = work_of(4.0, [1.0, 1.0], epochs=8, cycle=4, store_rows=4 * ROWS - 1)
    assert any("teacher.disk_bytes" in line for line in plan_warnings(work, make_plan(work, TWO_CORES)))
    work = work_of(4.0, [1.0, 1.0], epochs=8, cycle=4, store_rows=4 * ROWS)
    assert not any("teacher.disk_bytes" in line for line in plan_warnings(work, make_plan(work, TWO_CORES)))


def test_without_a_teacher_the_students_share_the_machine() -> None:
    work = work_of(None, [1.0, 3.0])
    plan = make_plan(work, TWO_CORES)
    assert (plan.teacher, plan.placement, plan.a_star) == (None, None, None)
    assert plan.rate == pytest.approx(0.5)
    assert "nothing to share" in plan_warnings(work, plan)[0]


def test_teacher_on_the_card_and_students_on_cores_do_not_take_from_each_other() -> None:
    work = work_of(1.0, [1.0] * 2)
    assert work.teacher is not None
    work = replace(work, teacher=replace(work.teacher, cost=Cost(1.0, "cuda", 1)))
    plan = make_plan(work, Machine(2.0, gpus=1))
    assert plan.rate == pytest.approx(1.0)  # both devices are then busy
    assert plan.a_star is None
    assert "teacher.resources.num_gpus=1" in plan.settings


# measured, and from a config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    options = ShardOptions(
        imbalance_ratio=10, n_max=40, val_per_class=0, store="raw", image_size=8, row_group_rows=32
    )
    write_shards(open_source(SourceSpec(kind="digits")), folder, options)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    net = build_model("digits_net_8", num_classes=10, image_size=8, seed=0)
    save_weights(net.state_dict(), ModelCard("digits_net_8", 10, 8, (0, 0, 0), (1, 1, 1), ""), path)
    return path


def raw_of(shards: Path, weights: Path, epochs: list[int], **more: Any) -> dict[str, Any]:
    students = [
        {"name": f"s{k}", "model": "digits_net_4", "train": {"epochs": num}} for k, num in enumerate(epochs)
    ]
    return raw_run(
        shards, teacher={"weights": str(weights)}, loss={"kd": {"weight": 1}}, students=students, **more
    )


def prepared_of(shards: Path, weights: Path, epochs: list[int], **more: Any) -> Prepared:
    return prepare(parse_config(raw_of(shards, weights, epochs, **more)))


def counted_one_by_one(prepared: Prepared, cycle: int | None) -> int:
    """Every (view, row) that the students' own plans name."""
    config, seen = prepared.config, set()
    for student in config.students:
        train = config.train_of(student)
        rows = EpochRows(
            prepared.train,
            RowSettings(
                train.sampler, prepared.class_counts, config.seed_of(student), 8, 1 << 20, cycle, 0, 1
            ),
        )
        for epoch in range(train.epochs):
            for row, times in enumerate(rows.plan(epoch).times):
                for copy in range(times):
                    view = epoch + copy
                    seen.add((view if cycle is None else view % cycle, row))
    return len(seen)


@pytest.mark.parametrize("sampler", ["instance_balanced", "class_balanced"])
@pytest.mark.parametrize("cycle", [None, 2])
def test_unique_views_are_those_of_the_students_own_plans(
    shards: Path, weights: Path, sampler: str, cycle: int | None
) -> None:
    prepared = prepared_of(
        shards, weights, [3, 1, 4], views={"cycle": cycle}, train={"sampler": {"name": sampler}}
    )
    assert count_views(prepared, prepared.config.students) == counted_one_by_one(prepared, cycle)


def test_each_kind_of_student_is_measured_once(shards: Path, weights: Path) -> None:
    said: list[str] = []
    costs = measure_costs(prepared_of(shards, weights, [2, 5]), seconds=0.0, say=said.append)
    assert costs.students["s0"] is costs.students["s1"]
    assert len(said) == 2  # the teacher, and one kind of student
    assert costs.teacher is not None
    assert min(costs.teacher.seconds, costs.students["s0"].seconds) > 0
    assert (
        costs.teacher_width
        == 10 + build_model("digits_net_8", num_classes=10, image_size=8, seed=0).feature_dim
    )


def test_a_dearer_student_is_measured_as_dearer(shards: Path, weights: Path) -> None:
    raw = raw_of(shards, weights, [1, 1])
    raw["students"][1]["model"] = "digits_net_32"
    costs = measure_costs(prepare(parse_config(raw)), seconds=0.1, say=lambda _: None)
    assert costs.students["s1"].seconds > 1.5 * costs.students["s0"].seconds


def test_command_prints_shares_bound_and_settings_that_the_config_takes(
    shards: Path, weights: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw_of(shards, weights, [2, 2])))
    done = CliRunner().invoke(app, ["plan", str(config), "--seconds", "0"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    settings = [line.split("--set ")[1] for line in lines if "--set " in line]
    assert any(line.startswith("A*: ") for line in lines)
    assert any(line.startswith("speed at best: ") for line in lines)
    assert [text.split("=")[0] for text in settings] == [
        "teacher.replicas",
        "teacher.resources.num_cpus",
        "students.s0.resources.num_cpus",
        "students.s1.resources.num_cpus",
    ]
    given = itertools.chain.from_iterable(("--set", text) for text in settings)
    again = CliRunner().invoke(app, ["plan", str(config), "--seconds", "0", *given])
    assert again.exit_code == 0, again.output


def test_views_that_students_have_in_common_count_once(shards: Path, weights: Path) -> None:
    prepared = prepared_of(shards, weights, [3] * 10)
    assert count_views(prepared, prepared.config.students) == 3 * sum(prepared.class_counts)
