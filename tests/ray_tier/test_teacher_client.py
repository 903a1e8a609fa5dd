"""A student's side of the conversation: how far it asks ahead, when it asks again, when it gives up."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray

from krd_ray.data.shard_set import Batch
from krd_ray.errors import TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher import messages
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.messages import Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.ports import ActorPort

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PLAIN = Rectifier()


def cut(rows: Batch, size: int, view: int = 0) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield Batch(
            rows.sample_ids[part],
            rows.labels[part],
            rows.images_BHWC[part],
            np.full_like(rows.labels[part], view),
        )


class Replica:
    """Stands in for an actor handle: `answer` makes an object reference of a request, in this process."""

    def __init__(self, answer: Callable[[TargetRequest], Any]) -> None:
        self._answer = answer
        self.requests: list[TargetRequest] = []

    @property
    def targets(self) -> Replica:
        return self

    def remote(self, request: TargetRequest) -> Any:
        self.requests.append(request)
        return self._answer(request)


def echo(request: TargetRequest, **changes: Any) -> Any:
    """A well-formed answer: the sample ids as logits."""
    logits = np.repeat(request.sample_ids[:, None] % 2048, 10, axis=1).astype(np.float16)
    answer = {
        "sample_ids": request.sample_ids,
        "logits": logits,
        "features": None,
        "rectifier": request.rectifier,
        "teacher_hash": request.teacher_hash,
        "incarnation": 0,
    }
    return ray.put(SoftTargets(**(answer | changes)))


def client_of(
    *replicas: Any, teacher_hash: str = "h", in_flight: int = 3, timeout_s: float = 10.0
) -> TeacherClient:
    ports = [ActorPort(replica) for replica in replicas]
    return TeacherClient(ports, teacher_hash, "small", PLAIN, in_flight=in_flight, timeout_s=timeout_s)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_worker_asks_ahead_but_never_for_more_than_its_window(rows: Batch, in_flight: int) -> None:
    replica = Replica(echo)
    stream = client_of(replica, in_flight=in_flight).stream(cut(rows, 20))
    num_batches = -(-len(rows) // 20)
    for number, _ in enumerate(stream):
        assert len(replica.requests) == min(number + 1 + in_flight, num_batches)
    assert number + 1 == num_batches


def test_answers_of_several_replicas_come_back_in_the_order_of_the_batch(rows: Batch) -> None:
    replicas = [Replica(echo) for _ in range(3)]
    for batch, targets in client_of(*replicas).stream(cut(rows, 50)):
        assert np.array_equal(targets.sample_ids, batch.sample_ids)
        assert np.array_equal(targets.logits[:, 0].astype(np.int64), batch.sample_ids % 2048)
    for replica in replicas:
        for request in replica.requests:
            images = ray.get(request.pixels).images_BHWC[request.rows]
            assert len(images) == len(request.sample_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hash": "other"}, "answer of teacher other .* to a question to h"),
        ({"rectifier": Rectifier(tau_prior=1.0)}, r"tau_prior=1\.0.* to a question"),
        ({"sample_ids": np.arange(20)}, "sample ids are not those asked for"),
    ],
    ids=["hash", "rectifier", "ids"],
)
def test_an_answer_to_another_question_is_refused(rows: Batch, changes: dict[str, Any], message: str) -> None:
    replica = Replica(lambda request: echo(request, **changes))
    with pytest.raises(TeacherError, match=message):
        next(client_of(replica).stream(cut(rows, 20)))


def test_no_answer_in_time_is_an_error_that_names_student_replica_and_setting(rows: Batch) -> None:
    @ray.remote(num_cpus=0)
    class Silent:
        def targets(self, _: TargetRequest) -> None:
            time.sleep(60)

    silent = Silent.remote()
    started = time.perf_counter()
    with pytest.raises(TeacherError, match=r"student small: teacher replica 0 .* teacher\.timeout_s"):
        next(client_of(silent, timeout_s=0.5).stream(cut(rows, 20)))
    assert time.perf_counter() - started < 5
    ray.kill(silent)


def dead_owners_pixels(batch: Batch) -> Any:
    """A reference to pixels whose owner, a student's worker, has been killed."""

    @ray.remote(num_cpus=0)
    class Student:
        def put(self) -> list[Any]:
            return [ray.put(Pixels(batch.images_BHWC))]

    @ray.remote(num_cpus=0)
    def is_lost(pixels: list[Any]) -> bool:
        try:
            ray.get(pixels)
        except ray.exceptions.ObjectLostError:
            return True
        return False

    student = Student.remote()
    pixels = ray.get(student.put.remote())
    ray.kill(student)
    deadline = time.monotonic() + 20
    while not ray.get(is_lost.remote(pixels)):
        assert time.monotonic() < deadline, "the pixels outlive their owner"
        time.sleep(0.2)
    return pixels[0]


def test_a_request_whose_pixels_are_lost_is_sent_again_with_new_ones(
    served_without_blocks: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    (group, teacher_hash), batch = served_without_blocks, next(cut(rows, 32, new_view()))
    lost = dead_owners_pixels(batch)

    def lose_first(request: TargetRequest) -> Any:
        if len(replica.requests) == 1:
            request = TargetRequest(**{**request.__dict__, "pixels": lost})
        return group.replicas[0].targets.remote(request)

    replica = Replica(lose_first)
    client = client_of(replica, teacher_hash=teacher_hash, in_flight=1, timeout_s=30.0)
    ((_, targets),) = client.stream(iter([batch]))
    assert np.array_equal(targets.sample_ids, batch.sample_ids)
    assert (client.stats.requests, client.stats.retries) == (2, 1)


def test_a_teacher_that_fails_every_time_is_given_up_with_the_last_reason(
    served_without_blocks: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    group, teacher_hash = served_without_blocks
    batch = next(cut(rows, 8, new_view()))
    lost = dead_owners_pixels(batch)
    replica = Replica(
        lambda request: group.replicas[0].targets.remote(
            TargetRequest(**{**request.__dict__, "pixels": lost})
        )
    )
    client = client_of(replica, teacher_hash=teacher_hash, in_flight=1, timeout_s=30.0)
    with pytest.raises(TeacherError, match=r"replica 0 failed 5 times on one request; last: .*OwnerDied"):
        list(client.stream(iter([batch])))


def test_a_student_killed_while_its_request_waits_does_not_hurt_another_one(
    teachers: Any, served_without_blocks: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    (group, teacher_hash), view = served_without_blocks, new_view()
    batch, other = (next(cut(rows, 64, number)) for number in (view, view + 50_000))
    pid = ray.get(group.replicas[0].info.remote()).pid

    @ray.remote(num_cpus=0)
    class Student:
        def ask(self, teacher: Any) -> int:
            pixels = ray.put(Pixels(batch.images_BHWC))
            request = TargetRequest(
                "doomed",
                teacher_hash,
                batch.sample_ids,
                batch.labels,
                batch.view_index,
                pixels,
                np.arange(64),
                PLAIN,
            )
            self.answer = teacher.targets.remote(request)
            return os.getpid()

    expected = next(teachers.client(served_without_blocks, PLAIN).stream(iter([other])))[1]
    doomed = Student.remote()
    os.kill(pid, signal.SIGSTOP)  # the teacher is busy for as long as the test wants
    try:
        student_pid = ray.get(doomed.ask.remote(group.replicas[0]))
        time.sleep(0.3)
        os.kill(student_pid, signal.SIGKILL)
        time.sleep(0.3)
        survivor = teachers.client(served_without_blocks, PLAIN).stream(iter([batch]))
        started = time.perf_counter()
    finally:
        os.kill(pid, signal.SIGCONT)
    ((_, targets),) = survivor
    assert time.perf_counter() - started < 20
    assert targets.logits.shape == expected.logits.shape
    before = messages.RECEIVED_BYTES["targets"]
    ((_, again),) = teachers.client(served_without_blocks, PLAIN).stream(iter([batch]))
    assert again.logits.tobytes() == targets.logits.tobytes()
    assert messages.RECEIVED_BYTES["targets"] - before == targets.num_bytes
    assert ray.get(group.replicas[0].info.remote()).pid == pid, "the teacher itself lived on"
