"""Answers whether missing resources are named before a run starts, and whether progress shows what happens.

Does not start Ray.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.autoscaler.v2.schema import (
    ClusterStatus,
    NodeInfo,
    NodeUsage,
    PlacementGroupResourceDemand,
    RayTaskActorDemand,
    ResourceDemandSummary,
    ResourceRequestByCount,
    ResourceUsage,
)
from rich.console import Console

from krd_ray.config import RayConfig
from krd_ray.config_io import parse_config
from krd_ray.errors import ResourceError
from krd_ray.train import cluster
from krd_ray.train.cluster import address_of, connected
from krd_ray.train.live import COLUMNS, Progress
from krd_ray.train.places import Demand, Node, check_resources, demands_of
from krd_ray.train.rundir import RunDir
from krd_ray.train.waiting import Unmet, unmet_of, waiting
from tests.unit.run_builders import raw_run, write_student

CPU = torch.device("cpu")


# cluster


def test_every_process_of_a_run_is_demanded() -> None:
    config = parse_config(
        raw_run(teacher={"weights": "w", "replicas": 2, "resources": {"num_cpus": 1, "num_gpus": 0.5}})
        | {
            "students": [
                {"name": "s", "model": "m", "workers": 3, "loss": {"kd": {"weight": 1}}},
                {"name": "t", "model": "m"},
            ]
        }
    )
    taught, alone = config.students
    demands = demands_of(config, config.students, taught=True, streams=False)
    assert [demand.who for demand in demands] == [
        "teacher replica 0", "teacher replica 1",
        "student s worker 0", "student s worker 1", "student s worker 2", "student t worker 0",
    ]  # fmt: skip
    assert demands[0].resources == {"CPU": 1.0, "GPU": 0.5}
    assert [demand.who for demand in demands_of(config, [alone], taught=False, streams=False)] == [
        "student t worker 0"
    ]
    streamed = demands_of(config, [taught, alone], taught=True, streams=True)
    assert len(streamed) == 7
    assert 0 < streamed[-1].resources["CPU"] < 1


def demands(*resources: dict[str, float]) -> list[Demand]:
    return [Demand(f"process {index}", amounts) for index, amounts in enumerate(resources)]


def nodes_of(resources: list[dict[str, float]]) -> list[Node]:
    return [Node(f"10.0.0.{number}", amounts) for number, amounts in enumerate(resources)]


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        ([{"CPU": 0.25}] * 8, [{"CPU": 2.0}]),
        ([{"CPU": 0.1}] * 10, [{"CPU": 1.0}]),
        ([{"CPU": 1.0}, {"CPU": 3.0}, {"CPU": 2.0}], [{"CPU": 3.0}, {"CPU": 3.0}]),
        ([{"CPU": 3.0}, {"CPU": 1.0}], [{"CPU": 3.0}, {"CPU": 1.0}]),
        ([{"CPU": 1.0}, {"CPU": 3.0}], [{"CPU": 3.0}, {"CPU": 1.0}]),
        ([{"CPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}], [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]),
        ([{"CPU": 2.0}, {"CPU": 2.0, "disk": 1.0}], [{"CPU": 2.0, "disk": 1.0}, {"CPU": 2.0}]),
        ([{}], [{"CPU": 1.0}]),
    ],
)
def test_run_that_fits_is_accepted(wanted: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    before = [dict(node) for node in nodes]
    check_resources(demands(*wanted), nodes_of(nodes))
    assert nodes == before


@pytest.mark.parametrize(
    ("wanted", "nodes", "expected"),
    [
        (
            [{"CPU": 1.0}] * 3,
            [{"CPU": 2.0, "memory": 5e9}],
            "the run needs 3 CPU in 3 processes, the cluster has 2 CPU",
        ),
        ([{"CPU": 2.0}] * 2, [{"CPU": 3.0}, {"CPU": 1.0}], "the cluster has 4 CPU on 2 node(s)"),
        ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0}], "process 0 needs 1 CPU, 1 GPU and finds no place"),
        ([{"CPU": 1.0}], [], "the cluster has nothing on 0 node(s)"),
    ],
)
def test_run_that_does_not_fit_is_refused_with_both_sides(
    wanted: list[dict[str, float]], nodes: list[dict[str, float]], expected: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        check_resources(demands(*wanted), nodes_of(nodes))
    assert expected in caught.value.message
    assert "students.*.resources" in caught.value.message


TWO_NODES = [
    Node("10.0.0.1", {"CPU": 4.0, "GPU": 1.0, "teacher": 1.0}, {"role": "teacher"}),
    Node("10.0.0.2", {"CPU": 2.0}, {"role": "student"}),
]


def placed_run(students: list[dict[str, Any]], **teacher: Any) -> list[Demand]:
    """The demands of a run whose students are all taught."""
    given = [{"name": f"s{k}", "model": "m", **student} for k, student in enumerate(students)]
    config = parse_config(raw_run(teacher={"weights": "w", **teacher}) | {"students": given})
    return demands_of(config, config.students, taught=True, streams=False)


@pytest.mark.parametrize(
    ("students", "teacher", "expected"),
    [
        (
            [{"resources": {"num_gpus": 0.6}}],
            {"resources": {"num_gpus": 0.8, "node_labels": {"role": "teacher"}}},
            "teacher replica 0 needs 1 CPU, 0.8 GPU on a node labelled role=teacher and finds no place",
        ),
        ([{}], {"resources": {"custom": {"tpu_box": 1}}}, """--resources='{"tpu_box": 1}'"""),
        ([{"resources": {"node_labels": {"zone": "in(a, b)"}}}], {}, "`ray start --labels=zone=a"),
        ([{"workers": 3, "strategy": "STRICT_SPREAD"}], {}, "10.0.0.1 and 1 more already has a worker of student s0"),
        (
            [{"workers": 5, "strategy": "STRICT_PACK"}],
            {},
            "student s0, 5 workers on one node, needs 5 CPU and finds no place",
        ),
    ],
)  # fmt: skip
def test_message_says_what_waits_for_what(
    students: list[dict[str, Any]], teacher: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ResourceError) as caught:
        check_resources(placed_run(students, **teacher), TWO_NODES)
    assert expected in caught.value.message


def test_each_node_says_what_it_lacks() -> None:
    pinned = {"resources": {"num_gpus": 0.5, "custom": {"teacher": 0.01}}}
    with pytest.raises(ResourceError) as caught:
        check_resources(placed_run([{"resources": {"num_gpus": 0.6}}], **pinned), TWO_NODES)
    assert caught.value.message.splitlines()[1:] == [
        "  node 10.0.0.1 has 0.5 GPU left beside teacher replica 0",
        "  node 10.0.0.2 has 0 GPU",
    ]


def test_process_that_few_nodes_take_goes_first() -> None:
    anywhere, labelled = {"num_cpus": 2}, {"num_cpus": 2, "node_labels": {"role": "student"}}
    students = [{"resources": anywhere}, {"resources": labelled}]
    check_resources(placed_run(students, resources={"num_cpus": 2}), TWO_NODES)
    check_resources(placed_run([{"workers": 2, "strategy": "STRICT_SPREAD"}]), TWO_NODES)
    check_resources(placed_run([{"workers": 3, "strategy": "STRICT_PACK"}]), TWO_NODES)


def test_processes_that_wait_are_named_by_what_ray_has_no_room_for() -> None:
    asked = placed_run(
        [{"workers": 2, "resources": {"num_gpus": 0.5}}, {}],
        resources={"num_cpus": 0, "node_labels": {"role": "teacher"}},
    )
    free = (Node("10.0.0.1", {"CPU": 1.0, "GPU": 0.25}), Node("10.0.0.2", {"CPU": 4.0}, {"role": "student"}))
    someone_else = (("CPU", 7.0),)
    gpu, label = waiting(asked, Unmet((someone_else, (("CPU", 1.0), ("GPU", 0.5)), ()), free)).values()
    assert gpu.startswith(
        "waiting: one or more of student s0 worker 0, student s0 worker 1 asks for 1 CPU, 0.5 GPU, "
    )
    assert gpu.splitlines()[1:] == ["  node 10.0.0.1 has 0.25 GPU", "  node 10.0.0.2 has 0 GPU"]
    assert label.startswith(
        "waiting: teacher replica 0 asks for a node labelled role=teacher, which no node has free"
    )
    assert label.splitlines()[1:] == [
        "  node 10.0.0.1 has no label role",
        "  node 10.0.0.2 is labelled role=student",
    ]


def test_ray_s_report_is_read_by_shape_workers_of_one_student_together_too() -> None:
    usage = NodeUsage([ResourceUsage("CPU", total=4.0, used=3.0)], idle_time_ms=0)
    node = NodeInfo("", "", "", "10.0.0.1", resource_usage=usage, labels={"role": "teacher"})
    pair = PlacementGroupResourceDemand([ResourceRequestByCount({"CPU": 2.0}, 2)], details="")
    actor = RayTaskActorDemand([ResourceRequestByCount({}, 1)])
    status = ClusterStatus(
        idle_nodes=[node],
        resource_demands=ResourceDemandSummary(placement_group_demand=[pair], ray_task_actor_demand=[actor]),
    )
    unmet = unmet_of(status)
    assert unmet.shapes == ((), (("CPU", 2.0),), (("CPU", 4.0),))
    assert unmet.free == (Node("10.0.0.1", {"CPU": 1.0}, {"role": "teacher"}),)
    asked = placed_run([{"workers": 2, "resources": {"num_cpus": 2}, "strategy": "STRICT_PACK"}])
    assert list(waiting(asked, unmet)) == ["student s0, 2 workers on one node,"]


# live


def test_elsewhere_than_in_a_terminal_each_epoch_is_one_line(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    with Progress(run, {"a": 3, "b": 3}, Console(file=out, width=40)) as progress:
        progress.refresh({"a": "training"})
        assert out.getvalue() == ""
        write_student(run, "a", epochs=1)
        progress.refresh({"a": "training"})
        progress.refresh({"a": "training"})
        progress.say("step [14] failed: [red]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "student a | state training | epoch 1/3 | loss 1.250 | val many 50.0% | medium - | few 25.0% | "
        "images/s 25 | waiting 25%",
        "step [14] failed: [red]",
    ]


def test_in_a_terminal_there_is_a_table_of_all_students(tmp_path: Path) -> None:
    run, out = RunDir(tmp_path), io.StringIO()
    write_student(run, "a", epochs=2)
    with Progress(run, {"a": 2, "b": 5}, Console(file=out, force_terminal=True, width=120)) as progress:
        progress.refresh({"a": "finished"})
    text = out.getvalue()
    assert all(column in text for column in COLUMNS)
    assert "finished" in text
    assert "2/2" in text
    assert "waiting" in text
    assert "0/5" in text


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "Ray could not start on this machine: too slow; "),
        ("auto", "join the cluster at auto: too slow; "),
    ],
)
def test_ray_that_does_not_come_up_is_an_error_for_people(
    monkeypatch: pytest.MonkeyPatch, address: str | None, expected: str
) -> None:
    def refuse(**_: Any) -> None:
        raise Exception("too slow\nand many more lines")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ResourceError, match=expected), connected(RayConfig(address=address)):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("address", "in_a_job", "joined"),
    [
        (None, False, None),
        (None, True, "10.0.0.5:6379"),
        ("auto", False, "auto"),
        ("10.0.0.9:6379", True, "10.0.0.9:6379"),
    ],
)
def test_job_joins_its_own_cluster_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, address: str | None, in_a_job: bool, joined: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")  # set alone, it is where `ray job submit` goes
    monkeypatch.delenv(cluster.JOB_CONFIG, raising=False)
    if in_a_job:
        monkeypatch.setenv(cluster.JOB_CONFIG, "{}")
    assert address_of(RayConfig(address=address)) == joined


def test_ray_marks_a_job_by_the_name_that_is_looked_for() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert cluster.JOB_CONFIG == RAY_JOB_CONFIG_JSON_ENV_VAR


def test_process_that_survives_the_end_of_its_cluster_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as survivor:
        monkeypatch.setattr(cluster, "GRACE_S", 0.1)
        monkeypatch.setattr(cluster, "_processes_of_raylets", lambda: [psutil.Process(survivor.pid)])
        monkeypatch.setattr("ray.init", lambda **_: None)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.setattr("ray.shutdown", lambda: None)
        with connected(RayConfig(num_cpus=1)):
            assert survivor.poll() is None
        assert survivor.wait(5) != 0
