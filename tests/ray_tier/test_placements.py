"""A teacher in an actor, inside a student and as a store on disk: the same bytes, each forward counted once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from krd_ray.data.pixels import CachedPixels
from krd_ray.data.shard_set import Batch, ShardSet, sample_ids_of
from krd_ray.errors import DataError, TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.ports import Port, TeacherLink
from krd_ray.teacher.replica import Replica
from krd_ray.teacher.spec import TeacherSpec, store_folder
from krd_ray.teacher.stats import read_stats

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

BOTH = Rectifier(tau_prior=1.0, exchange=True, features="balanced")
FEATURE_DIM = 64
Answers = dict[tuple[int, int], bytes]


def cut(rows: Batch, size: int, views: Sequence[int]) -> Iterator[Batch]:
    """All rows in each view, in batches; each view in an order of its own."""
    for view in views:
        order = np.random.default_rng(view).permutation(len(rows))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            in_view = np.full(len(part), view)
            yield Batch(rows.sample_ids[part], rows.labels[part], rows.images_BHWC[part], in_view)


def ask(client: TeacherClient, batches: Iterator[Batch], pause: Callable[[], Any] = lambda: None) -> Answers:
    """Answers by view and sample, logits and features; pauses after each batch."""
    found: Answers = {}
    for batch, targets in client.stream(batches):
        for k, key in enumerate(zip(batch.view_index.tolist(), targets.sample_ids.tolist(), strict=True)):
            found[key] = targets.logits[k].tobytes() + targets.features[k].tobytes()
        pause()
    return found


def client_of(ports: Sequence[Port], teacher_hash: str) -> TeacherClient:
    return TeacherClient(ports, teacher_hash, "small", BOTH, in_flight=None, timeout_s=30.0)


def stored(spec: TeacherSpec, teacher_hash: str) -> TeacherClient:
    link = TeacherLink("stored", teacher_hash, FEATURE_DIM, 30.0, spec=spec)
    return client_of(link.open("small", 0), teacher_hash)


# pixels by id


def test_cached_blocks_give_each_id_its_image_in_any_order_and_as_often_as_asked(
    cached: ShardSet, rows: Batch
) -> None:
    pixels = CachedPixels(cached, sample_ids_of(cached), timeout_s=10.0)
    draws = np.random.default_rng(0)
    for chosen in (
        draws.permutation(len(rows)),
        draws.integers(0, len(rows), 500),
        np.array([len(rows) - 1]),
    ):
        np.testing.assert_array_equal(pixels(rows.sample_ids[chosen]), rows.images_BHWC[chosen])
    assert len(cached.chunk_rows) > 5, "an image is looked for in more than one block"


def test_an_id_that_is_not_in_the_blocks_is_refused_and_a_split_without_blocks_too(
    cached: ShardSet, digits: Any, rows: Batch
) -> None:
    ids = sample_ids_of(cached)
    for unknown in (-1, int(ids.max()) + 1, 10**12):
        with pytest.raises(DataError, match=f"sample {unknown} is not in the shards in"):
            CachedPixels(cached, ids, timeout_s=10.0)(np.array([rows.sample_ids[3], unknown]))
    with pytest.raises(DataError, match=r"is not cached .* data\.cache"):
        CachedPixels(digits.raw, ids, timeout_s=10.0)


def test_a_replica_with_blocks_is_sent_no_pixels_and_answers_the_same_bytes(
    teachers: Any, served: Any, served_without_blocks: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    view, received, answers = new_view(), [], []
    for either in (served, served_without_blocks):
        before = either[0].stats()[0]
        answers.append(ask(teachers.client(either, BOTH), cut(rows, 40, [view])))
        after = either[0].stats()[0]
        assert after["forwards"] - before["forwards"] == len(rows)
        received.append(after["bytes_in"] - before["bytes_in"])
    assert answers[0] == answers[1]
    assert received == [0, rows.images_BHWC.nbytes]


# inside a student


def test_a_teacher_inside_a_student_answers_as_the_served_one_and_is_counted_under_its_name(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path, new_view: Callable[[], int]
) -> None:
    (group, teacher_hash), views = served, [new_view(), new_view()]
    (spec,) = teachers.specs(tmp_path, calibration=group._specs[0].calibration)
    link = TeacherLink("in_process", teacher_hash, FEATURE_DIM, 30.0, spec=spec)
    threads = torch.get_num_threads()
    ports = link.open("small", 1)
    inside = ask(client_of(ports, teacher_hash), cut(rows, 33, views))
    for port in ports:
        port.close()
    assert inside == ask(teachers.client(served, BOTH), cut(rows, 50, views))
    assert torch.get_num_threads() == threads, "they are the student's"
    (stats,) = read_stats(tmp_path / "teacher")
    assert stats["replica"] == "small.1"
    assert stats["forwards"] == stats["unique_views"] == 2 * len(rows)
    assert stats["process_cpu_s"] == 0, "the student counts its own process"
    assert stats["cpu_s"] > 0
    assert stats["restarted"] == 0
    assert not list((tmp_path / "store").rglob("page-*")), "no page is left behind"


# a store on disk


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_filled_store_answers_as_the_actors_do_and_is_not_filled_twice(
    teachers: Any, rows: Batch, tmp_path: Path, num_replicas: int
) -> None:
    calibration = str(tmp_path / "store/calibration.safetensors")
    specs = teachers.specs(tmp_path, num_replicas, persist=True, calibration=calibration)
    views, all_rows = [0, 2], 2 * len(rows)
    group, teacher_hash = teachers.start(specs)
    assert group.fill(teachers.shards, views) == group.rows_held(views) == all_rows
    filling = group.stats()
    assert sum(stats["forwards"] for stats in filling) == all_rows
    assert sum(stats["bytes_in"] for stats in filling) == 0
    served = ask(teachers.client((group, teacher_hash), BOTH), cut(rows, 40, views))
    assert sum(stats["forwards"] for stats in group.stats()) == all_rows
    group.close()

    warm = tmp_path / "warm"
    warm.mkdir()
    again, same_hash = teachers.start([replace(spec, run_dir=str(warm)) for spec in specs])
    assert again.fill(teachers.shards, views) == all_rows
    again.close()
    assert same_hash == teacher_hash
    assert [(stats["forwards"], stats["calibration_forwards"]) for stats in read_stats(warm)] == [
        (0, 0)
    ] * num_replicas

    client = stored(specs[0], teacher_hash)
    assert ask(client, cut(rows, 50, views)) == served
    with pytest.raises(TeacherError, match="lacks view 1; run `krd targets CONFIG`"):
        ask(client, cut(rows, 50, [1]))
    assert client.stats.retries == 0
    for page in store_folder(specs[0], teacher_hash, num_replicas - 1).glob("page-*"):
        page.unlink()
    with pytest.raises(TeacherError, match=r"page-\d+\.f16 is gone.*`krd targets CONFIG`"):
        ask(stored(specs[0], teacher_hash), cut(rows, 50, views))


def test_a_store_too_small_for_all_views_says_how_many_rows_it_still_holds(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path
) -> None:
    room_for_two_views = 2 * len(rows) * (10 + FEATURE_DIM) * 2 + (64 << 10)
    (spec,) = teachers.specs(tmp_path, persist=True, owns_process=False, disk_bytes=room_for_two_views)
    replica = Replica(spec)
    held = [replica.fill(teachers.shards, [view]) for view in range(4)]
    assert held == [len(rows)] * 4
    assert len(rows) < replica.rows_held(range(4)) < 4 * len(rows)
    assert replica.rows_held([0]) == 0
    assert replica.rows_held([3]) == len(rows)
    replica.close()
    assert replica.info().teacher_hash == served[1]


def test_a_store_that_was_never_filled_says_how_to_fill_it(
    teachers: Any, served: Any, tmp_path: Path
) -> None:
    (spec,) = teachers.specs(tmp_path, persist=True)
    with pytest.raises(TeacherError, match=r"holds no targets of this teacher .* `krd targets CONFIG`"):
        stored(spec, served[1])
    group, teacher_hash = teachers.start([spec])
    group.close()
    Path(spec.calibration).unlink()
    with pytest.raises(TeacherError, match=r"calibration\.safetensors is missing; run `krd targets CONFIG`"):
        stored(spec, teacher_hash)


# students of unequal speed


def test_a_slow_student_and_a_late_one_cost_no_second_forward(
    teachers: Any, rows: Batch, tmp_path: Path
) -> None:
    budget, views = 16 << 10, [0, 1, 2]
    served = teachers.start(teachers.specs(tmp_path, memory_bytes=budget, disk_bytes=1 << 20))
    late_has_begun, done_s, slow_batches = threading.Event(), {}, count(1)

    def dawdle() -> None:
        time.sleep(0.01)
        if (
            next(slow_batches) == 25
        ):  # in its second view; whatever the machine's load, the late one meets it there
            assert late_has_begun.wait(60)

    def student(name: str, size: int, pause: Callable[[], Any]) -> Answers:
        answers = ask(teachers.client(served, BOTH, in_flight=None), cut(rows, size, views), pause)
        done_s[name] = time.monotonic()
        return answers

    with ThreadPoolExecutor(3) as threads:
        fast = threads.submit(student, "fast", 32, lambda: None)
        slow = threads.submit(student, "slow", 24, dawdle)
        first = fast.result(timeout=60)
        started_s = time.monotonic()
        late = threads.submit(student, "late", 40, late_has_begun.set)
        assert first == slow.result(timeout=60) == late.result(timeout=60)
    assert done_s["fast"] < started_s < done_s["slow"]
    assert len(first) == 3 * len(rows)
    stats = served[0].stats()[0]
    served[0].close()
    assert stats["forwards"] == stats["unique_views"] == 3 * len(rows)
    assert stats["rows"] == 9 * len(rows)
    assert stats["store_memory_bytes"] <= budget < stats["store_disk_bytes"]
