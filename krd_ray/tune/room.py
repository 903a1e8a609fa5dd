"""Answers how many trials the cluster holds at the same time, beside the teacher they share.

Does not reserve anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from krd_ray.errors import ResourceError
from krd_ray.train.cluster import free_resources, living_nodes
from krd_ray.train.places import Demand, check_resources, demands_of
from krd_ray.train.prepare import Prepared
from krd_ray.tune.check import Probe

MOST = 256


def trials_that_fit(prepared: Prepared, probe: Probe, *, streams: bool) -> int:
    """Returns the largest number of trials that find a place together now, at least 1.

    Nodes are packed process by process, as for a run's students; on a cluster that others use, what is free now
    bounds the number too.

    Args:
        prepared: the search.
        probe: its kinds of trials; all reserve the same.
        streams: shards are read each epoch, which takes a place too.
    """
    return max(_most(prepared, probe, streams=streams, free=free_resources()), 1)


def places_for_trials(prepared: Prepared, probe: Probe, *, streams: bool) -> int:
    """Returns the largest number of trials that the nodes have places for, whatever others hold now; may be 0.

    Args:
        prepared, probe, streams: as for `trials_that_fit`.
    """
    return _most(prepared, probe, streams=streams, free=None)


def check_at_once(prepared: Prepared, probe: Probe, at_once: int, *, streams: bool) -> None:
    """Refuses a number of trials at once that would wait for ever.

    Args:
        prepared, probe, streams: as for `trials_that_fit`.
        at_once: trials that are to run at the same time.
    Raises:
        ResourceError: the nodes have no places for so many.
    """
    shared, own = _demands(prepared, probe, streams=streams)
    try:
        check_resources([*shared, *own * at_once], living_nodes())
    except ResourceError as error:
        most = places_for_trials(prepared, probe, streams=streams)
        raise ResourceError(
            f"--at-once {at_once} does not fit: the cluster holds {most} trial(s) at the same time, beside what they "
            f"share ({error.message.partition('. ')[0]}). Leave --at-once out or lower --at-once, also together with "
            "--resume; or lower students.*.resources, raise ray.num_cpus on one machine, or join a larger cluster"
        ) from error


def _demands(prepared: Prepared, probe: Probe, *, streams: bool) -> tuple[list[Demand], list[Demand]]:
    """What all trials share, and what each of them reserves."""
    config = prepared.config
    taught = probe.needs_teacher and config.teacher is not None and config.teacher.placement == "actors"
    shared = demands_of(config, [], taught=taught, streams=streams)
    return shared, demands_of(config, [probe.typical], taught=False, streams=False)


def _most(prepared: Prepared, probe: Probe, *, streams: bool, free: dict[str, float] | None) -> int:
    shared, own = _demands(prepared, probe, streams=streams)
    nodes = living_nodes()
    if all(not demand.resources for demand in own):
        return MOST
    for number in range(1, MOST + 1):
        demands = [*shared, *own * number]
        try:
            check_resources(demands, nodes)
        except ResourceError:
            return number - 1
        if free is not None and not _are_free(demands, free):
            return number - 1
    return MOST


def _are_free(demands: Sequence[Demand], free: dict[str, float]) -> bool:
    needed: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand.resources.items():
            needed[name] = needed.get(name, 0.0) + amount
    return all(amount <= free.get(name, 0.0) + 1e-9 for name, amount in needed.items())
