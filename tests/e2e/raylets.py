"""Answers how a test gets a cluster of several raylets on this machine: a process of its own that obeys line by line.

Run as a command it starts the head, then reads one JSON object a line and answers with one: {"add": arguments of
`Cluster.add_node`}, {"remove": node id} or {"received": true}. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = {"num_cpus": 0, "object_store_memory": 160 << 20}
ENVIRONMENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32, "OMP_NUM_THREADS": "1"}


class Raylets:
    """The cluster as a test sees it."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process, self.environment = process, environment
        first = self._answer()
        self.address, self.head = first["address"], first["node"]

    def add(self, **arguments: Any) -> str:
        """Starts a node and returns its id."""
        return str(self._ask({"add": SMALL | arguments})["node"])

    def remove(self, node: str) -> None:
        self._ask({"remove": node})

    def received(self) -> dict[str, int]:
        """Bytes that each node's object store has taken in so far, made there or brought by the network."""
        return dict(self._ask({"received": True}))

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise AssertionError(f"the cluster ended with {self._process.wait()}")


@contextmanager
def raylets(**head: Any) -> Iterator[Raylets]:
    """A cluster for the time of the block; `head` are arguments of `Cluster.add_node`."""
    with tempfile.TemporaryDirectory(prefix="krd", dir="/tmp") as folder:  # sockets: paths up to 107 bytes
        environment = os.environ | ENVIRONMENT | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(SMALL | {"include_dashboard": False} | head)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Raylets(process, environment)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def _main() -> None:
    from ray._private.internal_api import get_state_from_address
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
    _say({"address": cluster.address, "node": cluster.head_node.node_id})
    state = get_state_from_address(cluster.address)
    for line in sys.stdin:
        command = json.loads(line)
        if "add" in command:
            _say({"node": cluster.add_node(**command["add"]).node_id})
        elif "remove" in command:
            (node,) = [each for each in cluster.worker_nodes if each.node_id == command["remove"]]
            cluster.remove_node(node)
            _say({})
        else:
            alive = [node for node in state.node_table() if node["Alive"]]
            _say({node["NodeID"]: _received(node) for node in alive})
    cluster.shutdown()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _received(node: dict[str, Any]) -> int:
    """What `ray memory --stats-only` adds up, of one node: bytes of all objects ever made in its store."""
    from ray._private.internal_api import node_stats

    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.cumulative_created_bytes)


if __name__ == "__main__":
    _main()
