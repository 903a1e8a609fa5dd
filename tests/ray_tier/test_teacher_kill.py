"""kill -9 of the teacher's process while students stream: no answer is lost, changed or counted wrongly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from krd_ray.data.shard_set import Batch
from krd_ray.errors import TeacherError
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher import store
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.stats import read_stats

BOTH = Rectifier(tau_prior=1.0, exchange=True, features="balanced")
NUM_VIEWS = 3
ONE_FORWARD = 8 * 16  # rows: eight micro-batches at most


def cut(rows: Batch, size: int, view: int = 0) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield Batch(
            rows.sample_ids[part],
            rows.labels[part],
            rows.images_BHWC[part],
            np.full_like(rows.labels[part], view),
        )


def stream_views(
    client: TeacherClient,
    rows: Batch,
    size: int,
    views: range,
    pause: threading.Event,
    ready: threading.Barrier,
) -> dict[tuple[int, int], bytes]:
    """Answers by (view, sample); in the middle of the second view says `ready` and waits for `pause`."""
    found: dict[tuple[int, int], bytes] = {}
    for view in views:
        for number, (_, targets) in enumerate(client.stream(cut(rows, size, view))):
            for k, sample in enumerate(targets.sample_ids.tolist()):
                found[view, sample] = targets.logits[k].tobytes() + targets.features[k].tobytes()
            if view == 1 and number == 3:
                ready.wait(timeout=60)
                pause.wait(timeout=60)
    return found


@pytest.mark.parametrize("persist", [False, True], ids=["memory, pixels sent", "persist, cached blocks"])
def test_kill_9_while_two_students_stream_costs_no_answer(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path, persist: bool
) -> None:
    shards = teachers.shards if persist else teachers.digits.raw
    group, teacher_hash = teachers.start(teachers.specs(tmp_path, persist=persist, shards=shards))
    clients = [teachers.client((group, teacher_hash), BOTH) for _ in range(2)]
    before = stream_views(clients[0], rows, 32, range(1), threading.Event(), threading.Barrier(1))
    killed, ready = threading.Event(), threading.Barrier(3)
    pid = ray.get(group.replicas[0].info.remote()).pid
    with ThreadPoolExecutor(2) as threads:
        jobs = [
            threads.submit(stream_views, client, rows, size, range(NUM_VIEWS), killed, ready)
            for client, size in zip(clients, (16, 24), strict=True)
        ]
        ready.wait(timeout=60)
        os.kill(pid, signal.SIGKILL)
        killed.set()
        answers = [job.result(timeout=60) for job in jobs]
    untouched = stream_views(
        teachers.client(served, BOTH), rows, 50, range(NUM_VIEWS), killed, threading.Barrier(1)
    )
    assert answers[0] == answers[1] == untouched
    assert before == {key: value for key, value in untouched.items() if key[0] == 0}
    assert len(untouched) == NUM_VIEWS * len(rows)
    again = stream_views(clients[0], rows, 40, range(1), killed, threading.Barrier(1))
    assert again == before
    assert [client.stats.teacher_restarts for client in clients] == [1, 1]
    group.close()

    first, second = read_stats(tmp_path / "teacher")
    assert (first["restarted"], second["restarted"]) == (0, 1)
    assert (first["incarnation"], second["incarnation"]) == (0, 1)
    assert first["pid"] == pid != second["pid"]
    forwards, unique = (first[name] + second[name] for name in ("forwards", "unique_views"))
    all_views = NUM_VIEWS * len(rows)
    assert all_views - ONE_FORWARD <= unique <= all_views, "a kill may hit between a forward and its count"
    if persist:
        assert forwards == unique
    else:
        assert forwards > unique + len(rows) - 1, "view 0 was asked for again after its answers were lost"


def test_a_persistent_store_starts_warm_for_the_same_images_and_empty_for_others(
    teachers: Any, rows: Batch, tmp_path: Path
) -> None:
    specs = teachers.specs(tmp_path, persist=True)
    answers = []
    for run, changes in enumerate(({}, {}, {"dataset_hash": "other images under the same ids"})):
        folder = tmp_path / f"run-{run}"
        folder.mkdir()
        group = teachers.start([replace(specs[0], run_dir=str(folder), **changes)])
        wait_for_none, alone = threading.Event(), threading.Barrier(1)
        answers.append(stream_views(teachers.client(group, BOTH), rows, 32, range(1), wait_for_none, alone))
        group[0].close()
    assert answers[0] == answers[1] == answers[2]
    assert [read_stats(tmp_path / f"run-{run}")[-1]["forwards"] for run in range(3)] == [
        len(rows),
        0,
        len(rows),
    ]


def test_a_replica_that_is_killed_leaves_the_other_one_alone(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path
) -> None:
    group, teacher_hash = teachers.start(teachers.specs(tmp_path, num_replicas=2, persist=True))
    client = teachers.client((group, teacher_hash), BOTH)
    pids = [info.pid for info in ray.get([replica.info.remote() for replica in group.replicas])]
    answers: dict[int, bytes] = {}
    for number, (_, targets) in enumerate(client.stream(cut(rows, 24))):
        if number == 4:
            os.kill(pids[1], signal.SIGKILL)
        answers |= {s: targets.logits[k].tobytes() for k, s in enumerate(targets.sample_ids.tolist())}
    expected = {
        s: targets.logits[k].tobytes()
        for _, targets in teachers.client(served, BOTH).stream(cut(rows, 50))
        for k, s in enumerate(targets.sample_ids.tolist())
    }
    assert answers == expected
    group.close()
    starts = [(stats["replica"], stats["incarnation"]) for stats in read_stats(tmp_path / "teacher")]
    assert starts == [(0, 0), (1, 0), (1, 1)]


def test_a_store_folder_has_one_living_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.2)
    held = store.lock_folder(tmp_path / "replica-0")
    with pytest.raises(TeacherError, match=r"another running teacher keeps its target store in .*spill_dir"):
        store.lock_folder(tmp_path / "replica-0")
    held.close()
    store.lock_folder(tmp_path / "replica-0").close()
    assert np.all([path.name == "replica-0.lock" for path in tmp_path.iterdir()])
