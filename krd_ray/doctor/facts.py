"""Answers what is known of each node before it is judged; an actor on every node says it.

Does not judge (`checks` does).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from krd_ray.doctor import examiner
from krd_ray.train.cluster import living_nodes

ANSWER_TIMEOUT_S = 90.0
Key = TypeVar("Key")
PINGS = 5
HEAD = "node:__internal_head__"  # the resource by which Ray marks it


@dataclass(frozen=True)
class NodeFacts:
    """One node: what Ray says of it, what it says of itself, and what was measured from here.

    Args:
        name: address, with the start of the node's id where several share one.
        error: why the node did not answer; all that follows is then empty.
        versions: of Python and packages.
        ray_gpus: that Ray hands out; torch_gpus: that torch sees; torch_cuda: the CUDA that torch was built for.
        object_store_bytes, memory_bytes, shared_memory_bytes: sizes; the last of /dev/shm, None where there is none.
        disk_path: Ray's folder, which spilled objects go to, with its disk's size and free bytes.
        has_token: token authentication is on.
        open_ports: of Ray's processes, that listen beyond loopback, by program.
        dashboard: host:port where it listens, of the head; empty elsewhere and without one.
        clock_offset_s: the node's clock minus this one's; it is known to +- clock_bound_s, half a round trip.
        cannot_write: the shared folder: what went wrong when writing or removing; None when none was named.
        cannot_read: by node: why its file in the shared folder cannot be read here.
        cannot_read_data: why dataset.json cannot be read here; None when no config was named.
    """

    name: str
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    ray_gpus: float = 0.0
    torch_gpus: int = 0
    torch_cuda: str | None = None
    object_store_bytes: float = 0.0
    memory_bytes: int = 0
    shared_memory_bytes: int | None = None
    disk_path: str = ""
    disk_total_bytes: int = 0
    disk_free_bytes: int = 0
    has_token: bool = False
    open_ports: dict[str, list[int]] = field(default_factory=dict)
    dashboard: str = ""
    clock_offset_s: float = 0.0
    clock_bound_s: float = 0.0
    cannot_write: str | None = None
    cannot_read: dict[str, str] = field(default_factory=dict)
    cannot_read_data: str | None = None


def gather(shared: str | None, data: str | None) -> list[NodeFacts]:
    """Asks every node of the connected cluster.

    Args:
        shared: folder that all nodes are to see: an absolute path or a URI.
        data: the run's dataset.json, likewise.
    Returns:
        One entry per living node.
    """
    cloudpickle.register_pickle_by_value(examiner)
    try:
        return _gather(shared, data)
    finally:
        cloudpickle.unregister_pickle_by_value(examiner)


def _gather(shared: str | None, data: str | None) -> list[NodeFacts]:
    nodes = living_nodes()
    dashboard = (_internal_kv_get("webui:url", namespace=b"dashboard") or b"").decode()
    actor: Any = ray.remote(num_cpus=0)(examiner.Examiner)
    actors: dict[str, Any] = {
        node.name: actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote()
        for node in nodes
    }
    said, errors = _answers({name: each.facts.remote() for name, each in actors.items()})
    there = {name: actors[name] for name in said}
    measured: dict[str, dict[str, Any]] = {name: _clock(each) for name, each in there.items()}
    if data is not None:
        unread, lost = _answers({name: each.read.remote({data: None}) for name, each in there.items()})
        for name in there:
            measured[name]["cannot_read_data"] = lost.get(name) or unread[name].get(data, "")
    if shared is not None:
        for name, found in _try_folder(there, shared).items():
            measured[name] |= found
    return [
        NodeFacts(
            name=node.name,
            ray_gpus=node.resources.get("GPU", 0.0),
            object_store_bytes=node.resources.get("object_store_memory", 0.0),
            dashboard=dashboard if HEAD in node.resources else "",
            error=errors.get(node.name, ""),
            **said.get(node.name, {}),
            **measured.get(node.name, {}),
        )
        for node in nodes
    ]


def _answers(asked: dict[Key, Any]) -> tuple[dict[Key, Any], dict[Key, str]]:
    """What came within the time, and why the rest did not: a node or its storage may hang."""
    if not asked:
        return {}, {}
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    answers: dict[Key, Any] = {}
    errors: dict[Key, str] = {}
    for name, reference in asked.items():
        if reference not in ready:
            errors[name] = f"no answer in {ANSWER_TIMEOUT_S:.0f} s"
            continue
        try:
            answers[name] = ray.get(reference)
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            errors[name] = lines[-1]
    return answers, errors


def _clock(actor: Any) -> dict[str, float]:
    """The offset of a node's clock by the quickest of some round trips."""
    trips = []
    for _ in range(PINGS):
        sent = time.time()
        shown = ray.get(actor.clock.remote())
        received = time.time()
        trips.append((received - sent, shown - (sent + received) / 2))
    took, offset = min(trips)
    return {"clock_offset_s": offset, "clock_bound_s": took / 2}


def _try_folder(actors: dict[str, Any], shared: str) -> dict[str, dict[str, Any]]:
    """Each node writes a file, every other node reads it, and all is removed."""
    folder = f"{shared.rstrip('/')}/.krd-doctor-{uuid.uuid4().hex[:8]}"
    wrote, lost = _answers({name: each.write.remote(folder, _file(name)) for name, each in actors.items()})
    written = {f"{folder}/{_file(name)}": name for name, error in wrote.items() if not error}
    holds = {path: _file(name) for path, name in written.items()}
    read, hung = _answers({name: actors[name].read.remote(holds) for name in wrote})
    left: dict[str, str] = {}
    for name in wrote:  # one after the other: nodes that share the folder would remove it under each other
        left |= _answers({name: actors[name].remove.remote(folder)})[1]
    return {
        name: {
            "cannot_write": wrote.get(name) or lost.get(name) or hung.get(name) or left.get(name) or "",
            "cannot_read": {written[path]: error for path, error in read.get(name, {}).items()},
        }
        for name in actors
    }


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
