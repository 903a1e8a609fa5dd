"""Answers whether all processes of a run find places on the nodes together, and if not, who waits for what.

Does not ask a cluster: nodes are given, nothing is reserved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from krd_ray.config import Resources, RunConfig, StudentConfig
from krd_ray.config_resources import has_labels, one_of
from krd_ray.data.reading import READ_CPUS
from krd_ray.errors import ResourceError
from krd_ray.train.processes import heaviest_first, load_of, processes_of

Process = tuple[StudentConfig, ...]
MOST_LINES = 8
ENOUGH = 1e-9  # sums of fractions are not exact


@dataclass(frozen=True)
class Demand:
    """One process of the run: who, what it reserves (Ray's resource names), and the labels its node must have.

    Processes of one `apart` must be on different nodes.
    """

    who: str
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    apart: str | None = None

    @property
    def wanted(self) -> str:
        """What it asks for, for people."""
        label = f"a node labelled {_labels(self.labels)}" if self.labels else ""
        return " on ".join(part for part in (text_of(self.resources), label) if part) or "nothing"


@dataclass(frozen=True)
class Node:
    """One living node: how people know it, what it has in all, and Ray's id of it."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)
    id: str = ""


class _Place:
    """A node while the run's processes are laid on it."""

    def __init__(self, node: Node) -> None:
        self.node, self.free, self.holders = node, dict(node.resources), list[Demand]()

    def takes(self, demand: Demand) -> bool:
        return not self.lacks(demand)

    def take(self, demand: Demand) -> None:
        for name, amount in demand.resources.items():
            self.free[name] -= amount
        self.holders.append(demand)

    def lacks(self, demand: Demand) -> str:
        """Why the process finds no place here; empty when it does."""
        if not has_labels(demand.labels, self.node.labels):
            own = {name: self.node.labels[name] for name in demand.labels if name in self.node.labels}
            return f"is labelled {_labels(own)}" if own else f"has no label {', '.join(demand.labels)}"
        if demand.apart is not None and demand.apart in [holder.apart for holder in self.holders]:
            return f"already has a worker of {demand.apart}"
        short = [key for key, amount in demand.resources.items() if self.free.get(key, 0.0) + ENOUGH < amount]
        taken = [holder.who for holder in self.holders if holder.resources.keys() & set(short)]
        left = ", ".join(f"{max(self.free.get(key, 0.0), 0.0):g} {key}" for key in short)
        if taken:
            return f"has {left} left beside {few(taken)}"
        return f"has {left}" if short else ""


def check_run(
    config: RunConfig, students: Sequence[StudentConfig], nodes: Sequence[Node], *, streams: bool
) -> None:
    """Checks that what a run starts at the same time fits the nodes.

    With `students_at_once` those are the students that reserve most; besides, each student must fit on its own.

    Raises:
        ResourceError: as `check_resources`.
    """
    taught = any(config.loss_of(student).needs_teacher for student in students)
    if taught and config.teacher is not None and config.teacher.placement != "actors":
        if (
            config.teacher.placement == "in_process"
        ):  # actors calibrate and test it, and are gone when students start
            check_resources(demands_of(config, [], taught=True, streams=streams), nodes)
        taught = False
    processes = processes_of(config, students)
    groups = [[student for process in heaviest(processes, config.students_at_once) for student in process]]
    if config.students_at_once is not None:
        groups += [list(process) for process in processes]
    for group in groups:
        check_resources(demands_of(config, group, taught=taught, streams=streams), nodes)


def demands_of(
    config: RunConfig, students: Sequence[StudentConfig], *, taught: bool, streams: bool
) -> list[Demand]:
    """Returns every process that training these students starts, with what it reserves.

    The teacher's are among them when somebody is `taught`, a reading task when shards are streamed. Workers that
    must share a node are one demand.
    """
    demands = []
    if config.teacher is not None and taught:
        wanted = config.teacher.resources
        demands += [_demand(f"teacher replica {k}", wanted) for k in range(config.teacher.replicas)]
    for process in processes_of(config, students):
        demands += _workers(process)
    if streams:
        demands.append(Demand("reading shards", {"CPU": READ_CPUS}))
    return demands


def heaviest(processes: Sequence[Process], num: int | None) -> list[Process]:
    """Returns the processes that reserve most, with `num` students at most, but one at least; None: all."""
    return heaviest_first(processes, num, load=load_of, size=len)


def check_resources(demands: Sequence[Demand], nodes: Sequence[Node]) -> None:
    """Checks that all processes fit on the nodes at the same time: scarcest first, where least else is wasted.

    Args:
        demands: what will run together.
        nodes: the living ones.
    Raises:
        ResourceError: naming the first process that finds no place, what the run and the cluster have, what each
            node lacks, and what to change.
    """
    places = [_Place(node) for node in nodes]
    for demand in sorted(demands, key=lambda each: _scarcity(each, places)):
        open_places = [place for place in places if place.takes(demand)]
        place = min(open_places, key=_kinds_of, default=None)
        if place is None:
            raise ResourceError(_no_place(demand, demands, places))
        place.take(demand)


def _demand(who: str, wanted: Resources) -> Demand:
    return Demand(who, wanted.as_ray(), wanted.node_labels)


def _workers(process: Process) -> list[Demand]:
    student = process[0]
    names = few([each.name for each in process])
    who, one = f"student{'s' if len(process) > 1 else ''} {names}", student.resources
    if student.strategy == "STRICT_PACK" and student.workers > 1:
        together = {name: amount * student.workers for name, amount in one.as_ray().items()}
        return [Demand(f"{who}, {student.workers} workers on one node,", together, one.node_labels)]
    apart = who if student.strategy == "STRICT_SPREAD" else None
    return [
        Demand(f"{who} worker {rank}", one.as_ray(), one.node_labels, apart)
        for rank in range(student.workers)
    ]


def _scarcity(demand: Demand, empty: Sequence[_Place]) -> tuple[float, ...]:
    """Orders processes: those that few nodes could take first, then custom resources and GPUs before CPUs."""
    could = sum(place.takes(demand) for place in empty)
    cpus, gpus = demand.resources.get("CPU", 0.0), demand.resources.get("GPU", 0.0)
    return (could, -(sum(demand.resources.values()) - cpus - gpus), -gpus, -cpus)


def _kinds_of(place: _Place) -> int:
    """Kinds of resources that a node still has, Ray's own bookkeeping left out."""
    return sum(amount > ENOUGH for amount in total([place.free]).values())


def _no_place(demand: Demand, demands: Sequence[Demand], places: Sequence[_Place]) -> str:
    nodes = [place.node for place in places]
    return (
        f"{demand.who} needs {demand.wanted} and finds no place: the run needs "
        f"{text_of(total([each.resources for each in demands]))} in {len(demands)} processes, the cluster has "
        f"{text_of(total([node.resources for node in nodes])) or 'nothing'} on {len(nodes)} node(s). "
        f"{_remedy(demand, nodes)}{_node_lines(demand, places)}"
    )


def _remedy(demand: Demand, nodes: Sequence[Node]) -> str:
    """What to change: name what no node has at all, else ask for less or bring more."""
    absent = [name for name in demand.resources if not any(node.resources.get(name) for node in nodes)]
    named = {name: 1 for name in absent if name not in ("CPU", "GPU")}
    if named:
        text = ", ".join(f'"{name}": 1' for name in named)
        return f"No node has {', '.join(named)}: give it to one, `ray start --resources='{{{text}}}' ...`"
    if demand.labels and not any(has_labels(demand.labels, node.labels) for node in nodes):
        text = ",".join(f"{name}={one_of(wanted)}" for name, wanted in demand.labels.items())
        return f"No node is labelled so: label one, `ray start --labels={text} ...`, or change node_labels"
    return (
        "Lower students.*.resources or teacher.resources (fractions are allowed), lower students_at_once, raise "
        "ray.num_cpus on one machine, or join a larger cluster with ray.address"
    )


def node_lines(demand: Demand, free: Sequence[Node]) -> str:
    """Returns a line per node that says what it lacks for a process, given what each has free."""
    return _lines([(node, _Place(node).lacks(demand) or "has room") for node in free])


def _node_lines(demand: Demand, places: Sequence[_Place]) -> str:
    """A line per node that says what it lacks; nodes that lack the same are counted, one place needs no line."""
    if len(places) < 2 and not any(place.holders for place in places):
        return ""
    return _lines([(place.node, place.lacks(demand)) for place in places])


def _lines(lacks: Sequence[tuple[Node, str]]) -> str:
    """Nodes that lack the same share a line."""
    counts = Counter(reason for _, reason in lacks)
    first = {reason: node.name for node, reason in reversed(lacks)}
    lines = [
        f"node {first[reason]}{f' and {number - 1} more' if number > 1 else ''} {reason}"
        for reason, number in counts.items()
    ]
    more = [f"and {len(lines) - MOST_LINES} more kinds of nodes"] if len(lines) > MOST_LINES else []
    return "".join(f"\n  {line}" for line in [*lines[:MOST_LINES], *more])


def total(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the sums of resources, Ray's own bookkeeping left out."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            if name in ("CPU", "GPU") or not name.startswith(
                ("node:", "memory", "object_store", "accelerator")
            ):
                sums[name] = sums.get(name, 0.0) + amount
    return sums


def text_of(resources: dict[str, float]) -> str:
    """Returns resources for people, such as `1 CPU, 0.5 GPU`; nothing for none."""
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def few(names: Sequence[str]) -> str:
    """Returns the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
