"""Answers how several nodes run on one machine, and how one of them dies at once with all its processes.

Does not place anything: configs ask for the resources that the nodes here have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 300,
    "health_check_failure_threshold": 3,
}
# By default a store of less than 100 MB may never have enough to spill at a time.
ALWAYS = {"min_spilling_size": 8 << 20}
RAYLET = "raylet"


@dataclass(frozen=True)
class Shape:
    """What a node has: arguments of Ray's node start."""

    resources: dict[str, float]
    num_cpus: float = 1
    object_store_bytes: int = 100 << 20

    def as_ray(self) -> dict[str, Any]:
        """Returns them under Ray's names."""
        return {
            "num_cpus": self.num_cpus,
            "resources": self.resources,
            "object_store_memory": self.object_store_bytes,
        }


class Nodes:
    """A cluster of raylets on this machine; the first one is the head.

    Args:
        shapes: by name.
        quick: the death of a node is seen after about a second; else as Ray has it, so that a stopped one lives.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, quick: bool) -> None:
        from ray.cluster_utils import Cluster  # Ray reads the environment when it is imported

        self._cluster = Cluster(shutdown_at_exit=True)
        self._shapes, self._settings = shapes, ALWAYS | (QUICK if quick else {})
        self._nodes: dict[str, Any] = {}
        for name in shapes:
            self.add(name)

    @property
    def address(self) -> str:
        """Of the head, for `ray.address`."""
        return str(self._cluster.address)

    def add(self, name: str) -> None:
        """Starts a node of a named shape, also in the place of one that was killed."""
        head: dict[str, Any] = {"_system_config": self._settings, "include_dashboard": False}
        settings = self._shapes[name].as_ray() | ({} if self._nodes else head)
        self._nodes[name] = self._cluster.add_node(**settings)

    def raylet(self, name: str) -> psutil.Process:
        """The raylet of a node."""
        return psutil.Process(self._nodes[name].all_processes[RAYLET][0].process.pid)

    def processes(self, name: str) -> list[psutil.Process]:
        """All processes of a node: its raylet and what that started."""
        raylet = self.raylet(name)
        return [raylet, *raylet.children(recursive=True)]

    def kill(self, name: str) -> None:
        """kill -9 of a node's processes, all at once."""
        found = self.processes(name)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=10)

    def close(self) -> None:
        """Ends the cluster."""
        self._cluster.shutdown()


@contextmanager
def cluster_of(shapes: Mapping[str, Shape] | None, *, quick: bool) -> Iterator[Nodes | None]:
    """Nodes for the time of the block; None where no shapes are given."""
    if shapes is None:
        yield None
        return
    nodes = Nodes(shapes, quick=quick)
    try:
        yield nodes
    finally:
        nodes.close()
