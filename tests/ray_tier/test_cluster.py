"""What does not fit the cluster is refused at once, by numbers that the cluster itself gives."""

from __future__ import annotations

import os
import time

import pytest
import ray

from krd_ray.config import RayConfig
from krd_ray.errors import ResourceError
from krd_ray.train import waiting
from krd_ray.train.cluster import _processes_of_raylets, connected, living_nodes
from krd_ray.train.places import Demand, check_resources

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_demand_that_does_not_fit_is_refused_at_once_with_what_is_there() -> None:
    demands = [Demand(f"student s worker {rank}", {"CPU": 1.0}) for rank in range(5)]
    started = time.perf_counter()
    with pytest.raises(ResourceError, match=r"needs 5 CPU in 5 processes, the cluster has 4 CPU") as caught:
        check_resources(demands, living_nodes())
    assert time.perf_counter() - started < 2
    assert "on 1 node(s)" in str(caught.value)
    check_resources(demands[:4], living_nodes())


@pytest.mark.parametrize("wanted", [{"GPU": 1.0}, {"CPU": 0.1, "teacher_box": 1.0}])
def test_a_resource_that_no_node_has_is_named(wanted: dict[str, float]) -> None:
    with pytest.raises(ResourceError, match=rf"teacher replica 0 needs .*{next(reversed(wanted))}"):
        check_resources([Demand("teacher replica 0", wanted)], living_nodes())


def test_joining_a_cluster_that_is_already_connected_keeps_it() -> None:
    with connected(RayConfig(num_cpus=1)):
        assert ray.cluster_resources()["CPU"] == 4
    assert ray.is_initialized()


def test_processes_that_others_keep_from_their_places_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_S", 0.3)
    said: list[str] = []
    demands = [Demand(f"student s worker {rank}", {"CPU": 3.0}) for rank in range(2)]
    with waiting.saying_who_waits([*demands, Demand("teacher replica 0", {"CPU": 0.125})], said.append):
        busy = [ray.remote(num_cpus=3)(_Idle).remote() for _ in range(2)]
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(4 * waiting.LOOK_S)
    for actor in busy:
        ray.kill(actor)
    (sentence,) = said
    assert sentence.startswith(
        "waiting: one or more of student s worker 0, student s worker 1 asks for 3 CPU, which no node has free"
    )
    assert sentence.splitlines()[1].endswith(" has 1 CPU")


class _Idle:
    """Holds what it reserves."""


def test_workers_of_a_cluster_started_here_are_known_as_its_processes() -> None:
    pid = ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())
    assert pid in [process.pid for process in _processes_of_raylets()]
    assert os.getpid() not in [process.pid for process in _processes_of_raylets()]
