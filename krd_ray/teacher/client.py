"""Answers how a student's worker gets soft targets: ask ahead, check every answer, ask again after a failure.

Does not train and does not compute targets.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from krd_ray.data.remote_errors import own_error
from krd_ray.data.shard_set import Batch
from krd_ray.errors import TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.messages import Float16Array, Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.ports import Port
from krd_ray.teacher.store import IntArray
from krd_ray.teacher.window import Window

MAX_RETRIES = 5
RETRY_PAUSE_S = 0.1  # doubled each time


@dataclass
class ClientStats:
    """What a worker has seen of the teacher: requests, repeats, restarts, bytes, seconds of waiting."""

    requests: int = 0
    retries: int = 0
    teacher_restarts: int = 0
    bytes_received: int = 0
    wait_targets_s: float = 0.0
    wait_data_s: float = 0.0


@dataclass(frozen=True)
class _Part:
    """The share of a batch that one replica answers."""

    replica: int
    places: IntArray
    request: TargetRequest
    answer: Any


@dataclass(frozen=True)
class _InFlight:
    batch: Batch
    sent_at: float
    parts: list[_Part] = field(default_factory=list)


class TeacherClient:
    """Asks a teacher for one student's worker.

    Args:
        ports: one per replica, in order of their number; who has opened them closes them.
        teacher_hash: every answer must carry it.
        student: for messages.
        rectifier: the form of targets this student wants.
        in_flight: batches asked for ahead of the one in training; None: as many as the latency of answers takes.
        timeout_s: how long to wait for one answer, restarts of the teacher included.
    """

    def __init__(
        self,
        ports: Sequence[Port],
        teacher_hash: str,
        student: str,
        rectifier: Rectifier,
        *,
        in_flight: int | None,
        timeout_s: float,
    ) -> None:
        self._ports, self._hash, self._student = list(ports), teacher_hash, student
        self._rectifier, self._timeout_s = rectifier, timeout_s
        self._window = Window(in_flight)
        self._asked: deque[_InFlight] = deque()
        self._incarnations: dict[int, int] = {}
        self.stats = ClientStats()

    def stream(
        self, batches: Iterator[Batch], number: int | None = None
    ) -> Iterator[tuple[Batch, SoftTargets]]:
        """Yields the next batches with the targets of their views, in order, keeping `in_flight` requests ahead.

        What is asked for ahead when the last of them has been given out is given out by the next call: the teacher
        works on the next epoch while a worker validates or writes its checkpoint.

        Args:
            batches: of all epochs; the same iterator in every call.
            number: of batches to yield; None: all.
        Raises:
            TeacherError: no answer in time, or an answer that does not belong to the question.
        """
        self._window.restart()
        self._fill(batches)
        for _ in itertools.count() if number is None else range(number):
            if not self._asked:
                return
            asked = self._asked.popleft()
            targets = self._collect(asked)
            self._fill(batches)
            yield asked.batch, targets

    def _fill(self, batches: Iterator[Batch]) -> None:
        while len(self._asked) < self._window.size and (batch := self._next(batches)) is not None:
            self._asked.append(self._ask(batch))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        started = time.perf_counter()
        batch = next(batches, None)
        self.stats.wait_data_s += time.perf_counter() - started
        return batch

    def _ask(self, batch: Batch) -> _InFlight:
        pixels = self._ports[0].lend(batch.images_BHWC)
        homes = home_of(batch.sample_ids, len(self._ports))
        asked = _InFlight(batch, time.perf_counter())
        for replica in np.unique(homes).tolist():
            places = np.flatnonzero(homes == replica)
            request = TargetRequest(
                student=self._student,
                teacher_hash=self._hash,
                sample_ids=batch.sample_ids[places],
                labels=batch.labels[places],
                view_index=batch.view_index[places],
                pixels=pixels,
                rows=places,
                rectifier=self._rectifier,
            )
            asked.parts.append(_Part(replica, places, request, self._send(replica, request)))
        return asked

    def _send(self, replica: int, request: TargetRequest) -> Any:
        self.stats.requests += 1
        return self._ports[replica].send(request)

    def _collect(self, asked: _InFlight) -> SoftTargets:
        started = time.perf_counter()
        answers = [self._answer(part, asked.batch) for part in asked.parts]
        ended = time.perf_counter()
        self.stats.wait_targets_s += ended - started
        self._window.learn(asked.sent_at, started, ended)
        if len(answers) == 1:
            return answers[0]
        places = [part.places for part in asked.parts]
        return SoftTargets(
            asked.batch.sample_ids,
            _merge(places, [answer.logits for answer in answers]),
            _merge(places, [answer.features for answer in answers]),
            self._rectifier,
            self._hash,
            max(answer.incarnation for answer in answers),
        )

    def _answer(self, part: _Part, batch: Batch) -> SoftTargets:
        """One replica's answer. Ray itself repeats calls that a restart interrupts; this repeats what it cannot."""
        reference, request, last = part.answer, part.request, ""
        deadline = time.monotonic() + self._timeout_s
        for attempt in range(MAX_RETRIES):
            try:
                answer = self._ports[part.replica].receive(reference, max(deadline - time.monotonic(), 0.0))
                return self._checked(answer, part)
            except (RayActorError, ObjectLostError, RayTaskError) as error:
                if not _worth_repeating(error):
                    raise own_error(error) or error from None
                last = _reason(error)
            except GetTimeoutError as error:
                raise TeacherError(
                    f"student {self._student}: teacher replica {part.replica} gave no answer in "
                    f"{self._timeout_s:.0f} s; look at its log, or raise teacher.timeout_s"
                ) from error
            time.sleep(RETRY_PAUSE_S * 2**attempt)
            self.stats.retries += 1
            request = TargetRequest(**{**request.__dict__, "pixels": ray.put(Pixels(batch.images_BHWC))})
            reference = self._send(part.replica, request)
        raise TeacherError(
            f"student {self._student}: teacher replica {part.replica} failed {MAX_RETRIES} times on one request; "
            f"last: {last}"
        )

    def _checked(self, answer: SoftTargets, part: _Part) -> SoftTargets:
        if answer.teacher_hash != self._hash or answer.rectifier != self._rectifier:
            raise TeacherError(
                f"student {self._student}: answer of teacher {answer.teacher_hash} ({answer.rectifier}) to a "
                f"question to {self._hash} ({self._rectifier})"
            )
        if not np.array_equal(answer.sample_ids, part.request.sample_ids):
            raise TeacherError(f"student {self._student}: the answer's sample ids are not those asked for")
        if self._incarnations.setdefault(part.replica, answer.incarnation) != answer.incarnation:
            self.stats.teacher_restarts += answer.incarnation - self._incarnations[part.replica]
            self._incarnations[part.replica] = answer.incarnation
        self.stats.bytes_received += answer.num_bytes
        return answer


def _worth_repeating(error: Exception) -> bool:
    """True for a lost process, a lost object or pixels that did not come; False for what would only happen again."""
    return isinstance(_cause(error), (RayActorError, ObjectLostError, GetTimeoutError))


def _reason(error: Exception) -> str:
    """One line for people, such as `OwnerDiedError: Failed to retrieve object ...`."""
    cause = _cause(error)
    return f"{type(cause).__name__}: {str(cause).splitlines()[0]}"


def _cause(error: Exception) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error


def _merge(places: Sequence[IntArray], parts: Sequence[Float16Array | None]) -> Float16Array | None:
    present = [part for part in parts if part is not None]
    if len(present) != len(parts):
        return None
    merged = np.empty((sum(len(part) for part in present), present[0].shape[1]), np.float16)
    for where, part in zip(places, present, strict=True):
        merged[where] = part
    return merged
