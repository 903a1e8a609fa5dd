"""How many trials a cluster holds beside their teacher, by places on its nodes and by what others leave free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from krd_ray.config_io import parse_config
from krd_ray.errors import ResourceError
from krd_ray.train.places import Node
from krd_ray.tune import room
from tests.unit.run_builders import raw_run


def parts(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    *,
    trial: dict[str, float],
    teacher: dict[str, Any] | None = None,
    free: dict[str, float] | None = None,
    workers: int = 1,
) -> tuple[Any, Any]:
    """A prepared search and its probe, beside a cluster of these nodes."""
    students = [{"name": "s", "model": "digits_net_4", "resources": trial, "workers": workers}]
    taught = {"weights": "t.safetensors", **(teacher or {})}
    config = parse_config(raw_run(students=students, teacher=taught, views={"cycle": 2}))
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    monkeypatch.setattr(room, "living_nodes", lambda: [Node(f"n{k}", each) for k, each in enumerate(nodes)])
    monkeypatch.setattr(room, "free_resources", lambda: total if free is None else free)
    probe: Any = SimpleNamespace(needs_teacher=True, typical=config.students[0])
    return SimpleNamespace(config=config), probe


def fitting(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], **how: Any) -> int:
    streams = how.pop("streams", False)
    return room.trials_that_fit(*parts(monkeypatch, nodes, **how), streams=streams)


def test_teacher_is_subtracted_and_trials_fill_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    quarter = {"resources": {"num_cpus": 0.25}}
    half = {"num_cpus": 0.5}
    assert fitting(monkeypatch, [{"CPU": 2.0}], trial=half, teacher=quarter) == 3
    assert (
        fitting(monkeypatch, [{"CPU": 2.0}], trial={"num_cpus": 1.0}, teacher={"resources": {"num_cpus": 1}})
        == 1
    )
    assert fitting(monkeypatch, [{"CPU": 2.0}], trial=half, teacher=quarter, streams=True) == 3
    assert fitting(monkeypatch, [{"CPU": 4.0}], trial=half, teacher={**quarter, "replicas": 2}) == 7


def test_processes_are_packed_node_by_node_and_a_trial_may_have_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [{"CPU": 1.5}, {"CPU": 1.5}]
    quarter = {"resources": {"num_cpus": 0.25}}
    assert fitting(monkeypatch, nodes, trial={"num_cpus": 1.0}, teacher=quarter) == 2
    assert fitting(monkeypatch, [{"CPU": 4.0}], trial={"num_cpus": 0.5}, teacher=quarter, workers=2) == 3


def test_what_others_have_reserved_is_not_counted_and_one_trial_always_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quarter = {"resources": {"num_cpus": 0.25}}
    half = {"num_cpus": 0.5}
    assert fitting(monkeypatch, [{"CPU": 8.0}], trial=half, teacher=quarter, free={"CPU": 1.5}) == 2
    assert fitting(monkeypatch, [{"CPU": 8.0}], trial=half, teacher=quarter, free={"CPU": 0.0}) == 1


def test_store_without_a_teacher_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"placement": "stored", "persist": True, "spill_dir": "store", "resources": {"num_cpus": 1}}
    assert fitting(monkeypatch, [{"CPU": 2.0}], trial={"num_cpus": 0.5}, teacher=stored) == 4


def test_number_at_once_that_finds_no_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    quarter = {"resources": {"num_cpus": 0.25}}
    found = parts(monkeypatch, [{"CPU": 2.0}], trial={"num_cpus": 0.5}, teacher=quarter)
    room.check_at_once(*found, 3, streams=True)
    with pytest.raises(ResourceError, match=r"--at-once 4.* holds 3 .*2 CPU.*lower --at-once"):
        room.check_at_once(*found, 4, streams=True)
    with pytest.raises(ResourceError, match="holds 3 "):
        room.check_at_once(*found, 10_000, streams=True)


def test_what_others_hold_now_does_not_make_a_number_at_once_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts(monkeypatch, [{"CPU": 2.0}], trial={"num_cpus": 0.5}, free={"CPU": 0.0})
    room.check_at_once(*found, 2, streams=False)
    assert room.places_for_trials(*found, streams=False) == 2
    with pytest.raises(ResourceError, match="holds 0 "):
        room.check_at_once(*parts(monkeypatch, [{"CPU": 1.0}], trial={"num_cpus": 1}), 1, streams=False)
