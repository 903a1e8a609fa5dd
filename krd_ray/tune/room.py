"""Answers how many trials the cluster holds at the same time, beside the teacher they share.

Does not reserve anything.
"""

from __future__ import annotations

from krd_ray.errors import ResourceError
from krd_ray.train.cluster import check_resources, demands_of, free_resources, living_nodes
from krd_ray.train.prepare import Prepared
from krd_ray.tune.check import Probe

MOST = 256


def trials_that_fit(prepared: Prepared, probe: Probe, *, streams: bool) -> int:
    """Returns the largest number of trials that find a place together, at least 1.

    Nodes are packed process by process, as for a run's students; on a cluster that others use, what is free now
    bounds the number too.

    Args:
        prepared: the search.
        probe: its kinds of trials; all reserve the same.
        streams: shards are read each epoch, which takes a place too.
    """
    config = prepared.config
    taught = probe.needs_teacher and config.teacher is not None and config.teacher.placement == "actors"
    nodes, free = living_nodes(), free_resources()
    own = demands_of(config, [probe.typical], taught=False, streams=False)
    shared = demands_of(config, [], taught=taught, streams=streams)
    for number in range(1, MOST + 1):
        demands = [*shared, *own * number]
        needed: dict[str, float] = {}
        for demand in demands:
            for name, amount in demand.resources.items():
                needed[name] = needed.get(name, 0.0) + amount
        try:
            check_resources(demands, nodes)
        except ResourceError:
            return max(number - 1, 1)
        if any(amount > free.get(name, 0.0) + 1e-9 for name, amount in needed.items()):
            return max(number - 1, 1)
        if not own or all(not demand.resources for demand in own):
            return MOST
    return MOST
