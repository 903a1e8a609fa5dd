"""Answers how a worker gets the targets of its students: each batch is asked for once per form that they want.

Does not know how answers come (`teacher.client` does). Students that want the same form share an answer; without a
teacher the batches come alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from krd_ray.data.shard_set import Batch
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher.client import ClientStats, TeacherClient
from krd_ray.teacher.messages import SoftTargets
from krd_ray.teacher.ports import Port
from krd_ray.train.learner import Learner
from krd_ray.train.worker_spec import WorkerSpec

Answers = Mapping[Rectifier, SoftTargets]


class Questions:
    """One worker's clients of the teacher, one per form of targets, all on the same ports.

    Args:
        shared: settings on which all its students agree.
        learners: those students.
        batches: of all epochs that are left.
        rank: of the worker.
    """

    def __init__(
        self, shared: WorkerSpec, learners: Sequence[Learner], batches: Iterator[Batch], *, rank: int
    ) -> None:
        link, train = shared.teacher, shared.train
        forms = list(dict.fromkeys(each.rectifier for each in learners if each.rectifier is not None))
        self._ports: list[Port] = []
        self._clients: dict[Rectifier, TeacherClient] = {}
        self._alone = ClientStats()
        self._batches = itertools.tee(batches, max(len(forms), 1))
        if link is None or not forms:
            return
        self._ports = link.open(shared.student, rank)
        # Only an actor works while this process does: elsewhere there is no latency to hide.
        in_flight = train.in_flight or (None if link.placement == "actors" else 1)
        names = ", ".join(learner.spec.student for learner in learners)
        for form in forms:
            self._clients[form] = TeacherClient(
                self._ports, link.teacher_hash, names, form, in_flight=in_flight, timeout_s=link.timeout_s
            )

    def stream(self, number: int) -> Iterator[tuple[Batch, Answers]]:
        """Yields the next batches, each with the targets of its views in every form."""
        if not self._clients:
            yield from ((self._next(), {}) for _ in range(number))
            return
        asked = zip(self._clients.values(), self._batches, strict=True)
        for answers in zip(*(client.stream(batches, number) for client, batches in asked), strict=True):
            yield (
                answers[0][0],
                {form: given for form, (_, given) in zip(self._clients, answers, strict=True)},
            )

    def stats(self) -> ClientStats:
        """Returns what all clients have seen so far."""
        parts = [self._alone, *(client.stats for client in self._clients.values())]
        return ClientStats(
            **{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(ClientStats)}
        )

    def waits(self) -> ClientStats:
        """Returns the same with the seconds of waiting only."""
        stats = self.stats()
        return ClientStats(wait_targets_s=stats.wait_targets_s, wait_data_s=stats.wait_data_s)

    def close(self) -> None:
        """Closes the ports."""
        for port in self._ports:
            port.close()

    def _next(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._batches[0])
        self._alone.wait_data_s += time.perf_counter() - started
        return batch
