"""Answers whether the window of requests in flight follows what it measures, and stays within its bounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from krd_ray.data.shard_set import Batch
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.messages import SoftTargets, TargetRequest
from krd_ray.teacher.window import LARGEST, PATIENCE, SMALLEST, Window


class Worker:
    """A worker whose clock is simulated: it sends as many requests as its window allows, waits, trains."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.now_s, self.waited_s = 0.0, 0.0

    def train(self, steps: int, *, step_s: float, latency_s: float) -> None:
        """One epoch, for a teacher that answers each request `latency_s` after it was sent."""
        self.window.restart()
        sent: deque[float] = deque()
        for _ in range(steps):
            sent.extend([self.now_s] * (self.window.size - len(sent)))
            left, asked = sent.popleft(), self.now_s
            self.now_s = max(asked, left + latency_s)
            self.waited_s += self.now_s - asked
            self.window.learn(left, asked, self.now_s)
            sent.extend([self.now_s] * (self.window.size - len(sent)))
            self.now_s += step_s


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_fixed_window_stays_whatever_the_latency(size: int) -> None:
    worker = Worker(Window(size))
    for latency_s in (0.001, 2.0):
        worker.train(300, step_s=0.01, latency_s=latency_s)
        assert worker.window.size == size


def test_a_window_is_small_where_answers_are_quick() -> None:
    worker = Worker(Window())
    worker.train(1000, step_s=0.01, latency_s=0.008)
    assert worker.window.size == SMALLEST


@pytest.mark.parametrize("steps_of_latency", [2.5, 3.5, 5.5])
def test_a_window_grows_until_it_hides_the_latency_and_no_further(steps_of_latency: float) -> None:
    worker = Worker(Window())
    worker.train(60, step_s=0.01, latency_s=0.01 * steps_of_latency)
    hides = int(steps_of_latency) + 1
    assert hides <= worker.window.size <= hides + 1
    before_s = worker.waited_s
    worker.train(100, step_s=0.01, latency_s=0.01 * steps_of_latency)
    first_answer_s = 0.01 * steps_of_latency
    assert worker.waited_s - before_s < first_answer_s + 0.01


def test_a_window_has_an_upper_bound() -> None:
    worker = Worker(Window())
    worker.train(200, step_s=0.001, latency_s=1.0)
    assert worker.window.size == LARGEST


def test_a_window_shrinks_after_the_latency_has_fallen_and_waits_little_for_it() -> None:
    worker = Worker(Window())
    worker.train(200, step_s=0.01, latency_s=0.4)
    assert worker.window.size == LARGEST
    for _ in range(10):
        worker.train(PATIENCE // 2, step_s=0.01, latency_s=0.035)
    assert worker.window.size <= 5
    before_s = worker.waited_s
    for _ in range(10):
        worker.train(PATIENCE, step_s=0.01, latency_s=0.035)
        assert 3 <= worker.window.size <= 6
    assert worker.waited_s - before_s < 10 * (0.035 + 0.01), (
        "each epoch's first answer, and less than a step besides"
    )


def test_a_pause_between_epochs_is_not_a_slow_step() -> None:
    worker = Worker(Window())
    for _ in range(5):
        worker.train(40, step_s=0.01, latency_s=0.055)
        assert worker.window.size >= 6
        worker.now_s += 30.0  # validation and a checkpoint


class SlowPort:
    """A teacher that takes 3 ms for an answer and has nothing to say."""

    def lend(self, images: Any) -> None:
        del images

    def send(self, request: TargetRequest) -> TargetRequest:
        return request

    def receive(self, sent: TargetRequest, timeout_s: float) -> SoftTargets:
        del timeout_s
        time.sleep(0.003)
        return SoftTargets(sent.sample_ids, None, None, sent.rectifier, sent.teacher_hash, 0)

    def close(self) -> None:
        pass


def test_a_client_asks_ahead_into_the_next_epoch_and_loses_nothing_between_two() -> None:
    client = TeacherClient([SlowPort()], "h", "s", Rectifier(), in_flight=None, timeout_s=1.0)
    drawn = 0

    def batches() -> Iterator[Batch]:
        nonlocal drawn
        for number in range(60):
            drawn += 1
            ids = np.array([number])
            yield Batch(ids, ids, np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64))

    source, given, ahead = batches(), [], []
    given += [int(batch.sample_ids[0]) for batch, _ in client.stream(source, 30)]
    assert drawn - 30 >= LARGEST - 2, "the teacher has work while this worker validates"
    time.sleep(0.5)
    for batch, targets in client.stream(source, 30):
        assert np.array_equal(batch.sample_ids, targets.sample_ids)
        given.append(int(batch.sample_ids[0]))
        ahead.append(drawn - len(given))
    assert given == list(range(60))
    assert min(ahead[:20]) >= LARGEST - 2, "as far as at the end of the last epoch"
    assert client.stats.requests == 60
