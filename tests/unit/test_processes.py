"""Which students share a process: those that agree in what it does once for all of them, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from krd_ray.config import RunConfig
from krd_ray.config_io import parse_config
from krd_ray.errors import ResourceError
from krd_ray.train.places import Node, check_run, demands_of
from krd_ray.train.processes import load_of, processes_of
from tests.unit.run_builders import raw_run

TEACHER = {"weights": "t.safetensors"}


def config_of(changes: list[dict[str, Any]], **more: Any) -> RunConfig:
    """Students a, b, ... that differ from each other in what is given."""
    alike = {"model": "digits_net_4", "resources": {"num_cpus": 0.5}}
    students = [{"name": name, **alike, **change} for name, change in zip("abcdef", changes, strict=False)]
    return parse_config(raw_run(teacher=TEACHER, loss={"kd": {"weight": 1}}, students=students, **more))


def names_of(config: RunConfig) -> list[str]:
    return ["".join(each.name for each in process) for process in processes_of(config, config.students)]


def test_each_has_a_process_of_its_own_unless_asked_otherwise() -> None:
    assert names_of(config_of([{}] * 3)) == ["a", "b", "c"]


def test_processes_are_filled_in_the_order_of_the_students() -> None:
    assert names_of(config_of([{}] * 5, students_per_process=2)) == ["ab", "cd", "e"]
    assert names_of(config_of([{}] * 3, students_per_process=8)) == ["abc"]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "digits_net_8"},
        {"loss": {"kd": {"weight": 2}}},
        {"loss": {"kd": {"weight": 0}, "rrd": {"weight": 1}}},
        {"train": {"lr": 0.01, "optimizer": "adamw", "clip_norm": 1.0, "schedule": "constant"}},
        {"train": {"val_every_epochs": 3, "checkpoint_every_epochs": 2}},
    ],
)
def test_what_a_student_has_for_itself_may_differ(other: dict[str, Any]) -> None:
    assert names_of(config_of([{}, other], students_per_process=2)) == ["ab"]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"workers": 2},
        {"resources": {"num_cpus": 1}},
        {"strategy": "SPREAD"},
        {"loss": {"kd": {"weight": 0}}},  # no teacher
        {"train": {"epochs": 7}},
        {"train": {"batch_size": 7}},
        {"train": {"sampler": {"name": "class_balanced"}}},
        {"train": {"num_threads": 3}},
        {"train": {"in_flight": 3}},
        {"train": {"max_failures": 7}},
    ],
)
def test_what_a_process_does_once_keeps_students_apart(other: dict[str, Any]) -> None:
    assert names_of(config_of([{}, other, {}], students_per_process=2)) == ["ac", "b"]


def test_a_process_reserves_what_one_of_its_students_asks_for() -> None:
    config = config_of([{"workers": 2}] * 3, students_per_process=3)
    (process,) = processes_of(config, config.students)
    assert load_of(process) == (0.0, 1.0)
    demands = demands_of(config, config.students, taught=False, streams=False)
    assert [demand.who for demand in demands] == ["students a, b, c worker 0", "students a, b, c worker 1"]
    assert [demand.resources for demand in demands] == [{"CPU": 0.5}] * 2


def test_students_that_would_not_fit_apart_fit_together() -> None:
    nodes = [Node("n", {"CPU": 2.0})]
    apart = config_of([{}] * 4)
    with pytest.raises(ResourceError, match="finds no place"):
        check_run(apart, apart.students, nodes, streams=False)
    together = config_of([{}] * 4, students_per_process=2)
    check_run(together, together.students, nodes, streams=False)
