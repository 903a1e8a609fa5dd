"""Answers through what a student's worker reaches the teacher: an actor, its own process, or a store on disk.

Does not know batches, windows or retries (`client` does); to it all three look alike.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray

from krd_ray.data.shard_set import sample_ids_of
from krd_ray.errors import TeacherError
from krd_ray.storage.places import join
from krd_ray.teacher.answers import Answers
from krd_ray.teacher.calibrate import load_calibration
from krd_ray.teacher.engine import Images
from krd_ray.teacher.group import NAMESPACE
from krd_ray.teacher.messages import Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.replica import Replica
from krd_ray.teacher.spec import TeacherSpec
from krd_ray.teacher.stored import StoreReader

Placement = Literal["actors", "in_process", "stored"]


class Port(Protocol):
    """One replica as a client sees it."""

    def lend(self, images: Images) -> Any:
        """Returns what a request carries as its pixels."""

    def send(self, request: TargetRequest) -> Any:
        """Asks, and returns what `receive` takes."""

    def receive(self, sent: Any, timeout_s: float) -> SoftTargets:
        """Waits for the answer; raises GetTimeoutError when none comes in time."""

    def close(self) -> None:
        """Frees what this port has opened."""


class ActorPort:
    """A replica in a Ray actor.

    Args:
        replica: its handle.
        has_pixels: it looks pixels up by itself; they are sent only when a request is repeated.
    """

    def __init__(self, replica: Any, *, has_pixels: bool = False) -> None:
        self._replica, self._has_pixels = replica, has_pixels

    def lend(self, images: Images) -> Any:
        return None if self._has_pixels else ray.put(Pixels(images))

    def send(self, request: TargetRequest) -> Any:
        return self._replica.targets.remote(request)

    def receive(self, sent: Any, timeout_s: float) -> SoftTargets:
        answer: SoftTargets = ray.get(sent, timeout=timeout_s)
        return answer

    def close(self) -> None:
        """The actor serves others."""


class LocalPort:
    """A replica inside this process; it works when the answer is waited for.

    Args:
        spec: of the replica.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        self._replica = Replica(spec)

    def lend(self, images: Images) -> Any:
        return Pixels(images)

    def send(self, request: TargetRequest) -> Any:
        return request

    def receive(self, sent: Any, timeout_s: float) -> SoftTargets:
        del timeout_s  # nobody else is waited for
        return self._replica.targets(sent)

    def close(self) -> None:
        self._replica.close()


class StorePort:
    """A filled target store; no teacher runs.

    Args:
        spec: of the teacher that filled it.
        teacher_hash: its name.
        feature_dim: D_t.
        replica: whose store.
    """

    def __init__(self, spec: TeacherSpec, teacher_hash: str, feature_dim: int, replica: int) -> None:
        width = len(spec.class_counts) + feature_dim
        self._read = StoreReader(spec, teacher_hash, replica, sample_ids_of(spec.shards), width)
        self._answers = Answers(teacher_hash, spec.class_counts, incarnation=0, priors=spec.priors)
        found = load_calibration(spec.calibration, teacher_hash)
        if found is None:
            raise TeacherError(f"{spec.calibration} is missing; run `krd targets CONFIG`, which writes it")
        self._answers.calibrate(found[0])

    def lend(self, images: Images) -> Any:
        del images
        return None

    def send(self, request: TargetRequest) -> Any:
        return request

    def receive(self, sent: Any, timeout_s: float) -> SoftTargets:
        del timeout_s
        self._answers.check(sent)
        return self._answers.make(self._read(sent.view_index, sent.sample_ids), sent)

    def close(self) -> None:
        """Maps go with the process."""


@dataclass(frozen=True)
class TeacherLink:
    """How a student's workers reach the teacher.

    Args:
        placement: where it works.
        teacher_hash, feature_dim: what it is.
        timeout_s: how long to wait for one answer.
        replicas: handles of the actors; empty for other placements, and for a link that attaches by name.
        spec: for other placements; None for actors.
        has_pixels: the actors look pixels up by themselves.
        names: of the actors in namespace `krd_ray`.
    """

    placement: Placement
    teacher_hash: str
    feature_dim: int
    timeout_s: float
    replicas: tuple[Any, ...] = ()
    spec: TeacherSpec | None = None
    has_pixels: bool = False
    names: tuple[str, ...] = ()

    def detached(self) -> TeacherLink:
        """Returns the link without handles: whoever gets it attaches to the actors by their names."""
        return dataclasses.replace(self, replicas=())

    def attached(self) -> TeacherLink:
        """Returns the link with handles of the actors, looked up by name where it has none.

        Raises:
            TeacherError: the teacher of that name is gone.
        """
        if self.replicas or not self.names:
            return self
        try:
            found = tuple(ray.get_actor(name, namespace=NAMESPACE) for name in self.names)
        except ValueError as error:
            raise TeacherError(
                f"there is no teacher {self.names[0]} in this cluster any more; its driver has ended"
            ) from error
        return dataclasses.replace(self, replicas=found)

    def open(self, student: str, rank: int) -> list[Port]:
        """Returns one port per replica, for one worker of a student."""
        if self.placement == "actors":
            return [ActorPort(replica, has_pixels=self.has_pixels) for replica in self.replicas]
        assert self.spec is not None
        if self.placement == "stored":
            return [
                StorePort(self.spec, self.teacher_hash, self.feature_dim, replica)
                for replica in range(self.spec.num_replicas)
            ]
        name = f"{student}.{rank}"
        own = dataclasses.replace(
            self.spec,
            replica=0,
            num_replicas=1,
            known_as=name,
            owns_process=False,
            store_dir=join(self.spec.store_dir, name),
        )
        return [LocalPort(own)]
