"""Answers who waits for what when a run stands still: processes of the run for which no node has room now.

Does not wait and does not reserve: it reads what Ray reports as unmet and says it. On a cluster that others use, or
that has lost a node, a run waits for its places; what the cluster does not have at all is refused before (`places`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.autoscaler.v2.schema import ClusterStatus, ResourceRequestByCount
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError

from krd_ray.train.places import Demand, Node, few, node_lines

log = logging.getLogger(__name__)
LOOK_S = 5.0
PATIENCE = 3  # looks in a row: processes that are just starting are unmet for a moment


@dataclass(frozen=True)
class Unmet:
    """What Ray has no place for now, by shape, and what each node has free."""

    shapes: tuple[tuple[tuple[str, float], ...], ...]
    free: tuple[Node, ...]


@contextmanager
def saying_who_waits(demands: Sequence[Demand], say: Callable[[str], None]) -> Iterator[None]:
    """Says for the time of the block, once for each kind of process, when some of the run wait for a place.

    Args:
        demands: every process of the run.
        say: gets one sentence, and a line per node.
    """
    ended = threading.Event()
    address = ray.get_runtime_context().gcs_address
    thread = threading.Thread(target=_watch, args=(address, demands, say, ended), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _watch(
    address: str, demands: Sequence[Demand], say: Callable[[str], None], ended: threading.Event
) -> None:
    seen: dict[str, int] = {}
    while not ended.wait(LOOK_S):
        try:
            unmet = unmet_of(get_cluster_status(address))
        except RayError as error:  # the head is away for a moment; Ray itself waits for it
            log.warning("the cluster did not say what it has no room for: %s", error)
            continue
        sentences = waiting(demands, unmet)
        seen = {who: seen.get(who, 0) + 1 for who in sentences}
        for who, looks in seen.items():
            if looks == PATIENCE:
                say(sentences[who])


def unmet_of(status: ClusterStatus) -> Unmet:
    """Returns what matters here of Ray's report."""
    asked = status.resource_demands
    demands = [*asked.placement_group_demand, *asked.ray_task_actor_demand]
    bundles = [each.bundle for demand in demands for each in demand.bundles_by_count]
    bundles += [_together(demand.bundles_by_count) for demand in asked.placement_group_demand]
    shapes = {tuple(sorted(bundle.items())) for bundle in bundles}
    nodes = [*status.active_nodes, *status.idle_nodes]
    free = tuple(Node(node.ip_address, node.available_resources(), node.labels or {}) for node in nodes)
    return Unmet(tuple(sorted(shapes)), free)


def _together(parts: Sequence[ResourceRequestByCount]) -> dict[str, float]:
    """What the workers of one student ask for together, who may have to share a node."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, amount in part.bundle.items():
            sums[name] = sums.get(name, 0.0) + amount * part.count
    return sums


def waiting(demands: Sequence[Demand], unmet: Unmet) -> dict[str, str]:
    """Returns a sentence for each kind of the run's processes that has no place, by the names of that kind.

    Ray reports shapes, not names: processes that reserve the same are named together.
    """
    sentences = {}
    for shape in unmet.shapes:
        alike = [demand for demand in demands if tuple(sorted(demand.resources.items())) == shape]
        if not alike:
            continue  # somebody else's
        names = few([demand.who for demand in alike])
        sentences[names] = (
            f"waiting: {'one or more of ' if len(alike) > 1 else ''}{names} asks for "
            f"{alike[0].wanted}, which no node has free now; it starts when others end or a node "
            f"joins, and asking for less (resources) lets it start earlier{node_lines(alike[0], unmet.free)}"
        )
    return sentences
