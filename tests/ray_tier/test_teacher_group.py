"""A served teacher answers like the same model in one process, once per sample, whoever asks how."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from krd_ray.data.shard_set import Batch
from krd_ray.errors import TeacherError
from krd_ray.maths.rectify import Rectifier, log_class_prior, rectify_features, rectify_logits
from krd_ray.teacher import messages
from krd_ray.teacher.calibrate import load_calibration
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.group import TeacherGroup
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.messages import Pixels, TargetRequest

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PLAIN = Rectifier()
BOTH = Rectifier(features="teacher")
PROBE = np.zeros((4, 8, 8, 3), np.uint8)


def cut(rows: Batch, size: int, order: Any = None) -> Iterator[Batch]:
    """The rows in batches of `size`, in `order`."""
    order = np.arange(len(rows)) if order is None else order
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield Batch(rows.sample_ids[part], rows.labels[part], rows.images_BHWC[part], rows.view_index[part])


def ask(client: TeacherClient, batches: Iterator[Batch], view: int) -> dict[int, bytes]:
    """Answers by sample in a view: logits, then features, as bytes."""
    found: dict[int, bytes] = {}
    in_view = (replace(batch, view_index=np.full(len(batch), view)) for batch in batches)
    for _, targets in client.stream(in_view):
        parts = [part for part in (targets.logits, targets.features) if part is not None]
        for k, sample in enumerate(targets.sample_ids.tolist()):
            assert sample not in found
            found[sample] = b"".join(part[k].tobytes() for part in parts)
    return found


def as_rows(answers: dict[int, bytes], rows: Batch) -> np.ndarray:
    """Answers as float16 [N, width] in the order of `rows`."""
    return np.stack([np.frombuffer(answers[sample], np.float16) for sample in rows.sample_ids.tolist()])


def request_for(
    teacher_hash: str, batch: Batch, view: int, rectifier: Rectifier, pixels: Any
) -> TargetRequest:
    places = np.arange(len(batch))
    views = np.full(len(batch), view)
    return TargetRequest(
        "tester", teacher_hash, batch.sample_ids, batch.labels, views, pixels, places, rectifier
    )


def total(group: TeacherGroup, name: str) -> int:
    return sum(stats[name] for stats in group.stats())


def test_answers_are_the_model_in_one_process_within_one_unit_of_float16(
    teachers: Any, either: Any, rows: Batch, forward_here: TeacherForward, new_view: Callable[[], int]
) -> None:
    view = new_view()
    answers = as_rows(ask(teachers.client(either, PLAIN), cut(rows, 40), view), rows)
    here = forward_here(rows.images_BHWC, rows.sample_ids, np.full(len(rows), view))[:, :10]
    np.testing.assert_array_max_ulp(answers, here, maxulp=1)
    assert np.ptp(here.astype(np.float32), axis=0).min() > 1, "the logits differ between images"


def test_another_view_of_a_sample_gets_another_answer(
    teachers: Any, served: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    client = teachers.client(served, PLAIN)
    first, second = (as_rows(ask(client, cut(rows, 64), new_view()), rows) for _ in range(2))
    assert (first != second).any(axis=1).mean() > 0.5


def test_three_clients_at_once_cost_one_forward_per_sample_and_get_the_same_bytes(
    teachers: Any, either: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    group, view, draws = either[0], new_view(), np.random.default_rng(5)
    before = {name: total(group, name) for name in ("forwards", "unique_views", "hits", "joined", "rows")}
    plans = [(13, None), (32, draws.permutation(len(rows))), (50, np.arange(len(rows))[::-1])]
    with ThreadPoolExecutor(3) as threads:
        jobs = [
            threads.submit(ask, teachers.client(either, PLAIN), cut(rows, size, order), view)
            for size, order in plans
        ]
        answers = [job.result(timeout=60) for job in jobs]
    assert answers[0] == answers[1] == answers[2]
    done = {name: total(group, name) - value for name, value in before.items()}
    assert done["forwards"] == done["unique_views"] == len(rows)
    assert done["hits"] + done["joined"] == 2 * len(rows)
    assert done["rows"] == 3 * len(rows)


def test_batches_that_mix_views_and_repeat_samples_cost_one_forward_per_pair(
    teachers: Any, either: Any, rows: Batch, forward_here: TeacherForward, new_view: Callable[[], int]
) -> None:
    views, draws = np.array([new_view() for _ in range(4)]), np.random.default_rng(1)
    chosen, in_view = draws.integers(0, 50, 300), views[draws.integers(0, 4, 300)]
    sampled = Batch(rows.sample_ids[chosen], rows.labels[chosen], rows.images_BHWC[chosen], in_view)
    before = {name: total(either[0], name) for name in ("forwards", "rows", "hits", "joined")}
    client = teachers.client(either, PLAIN)
    answers = [targets.logits for _ in range(2) for _, targets in client.stream(cut(sampled, 60))]
    here = forward_here(sampled.images_BHWC, sampled.sample_ids, in_view)[:, :10]
    np.testing.assert_array_max_ulp(np.concatenate(answers), np.tile(here, (2, 1)), maxulp=1)
    done = {name: total(either[0], name) - value for name, value in before.items()}
    assert done["forwards"] == len(set(zip(chosen, in_view, strict=True))) < 200
    assert done["rows"] == done["forwards"] + done["hits"] + done["joined"] == 600


def test_two_replicas_answer_as_one_does_and_share_the_work(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path
) -> None:
    one = ask(teachers.client(served, BOTH), cut(rows, 33), 0)
    pair = teachers.start(teachers.specs(tmp_path, num_replicas=2))
    try:
        assert pair[1] == served[1]
        assert ask(teachers.client(pair, BOTH), cut(rows, 33), 0) == one
        homes = np.bincount(home_of(rows.sample_ids, 2), minlength=2).tolist()
        assert [stats["forwards"] for stats in pair[0].stats()] == homes
        assert min(homes) > 0.3 * len(rows)
        alone = load_calibration(Path(served[0]._specs[0].run_dir) / "calibration.safetensors", served[1])
        halves = load_calibration(tmp_path / "teacher/calibration.safetensors", served[1])
        assert alone is not None
        assert halves is not None
        torch.testing.assert_close(halves[0].class_means, alone[0].class_means)
        assert halves[1] == alone[1]
    finally:
        pair[0].close()


@pytest.mark.parametrize(
    "spec",
    [
        Rectifier(tau_prior=1.0, exchange=True),
        Rectifier(tau_prior=0.5, features="balanced", gate="by_count", gate_strength=0.8),
        Rectifier(features="mix", gate="constant", gate_strength=0.3, send_logits=False),
    ],
    ids=lambda spec: f"{spec.features}-tau{spec.tau_prior}",
)
def test_rectified_answers_are_the_formulas_applied_to_the_raw_outputs(
    teachers: Any, served: Any, rows: Batch, forward_here: TeacherForward, spec: Rectifier
) -> None:
    view = 7
    raw = torch.from_numpy(forward_here(rows.images_BHWC, rows.sample_ids, np.full(len(rows), view))).float()
    labels = torch.from_numpy(rows.labels)
    stored = load_calibration(Path(served[0]._specs[0].run_dir) / "calibration.safetensors", served[1])
    assert stored is not None
    expected = []
    if spec.send_logits:
        log_prior = log_class_prior(torch.tensor(teachers.digits.class_counts))
        expected.append(
            rectify_logits(raw[:, :10], labels, log_prior, tau_prior=spec.tau_prior, exchange=spec.exchange)
        )
    if spec.features != "off":
        expected.append(rectify_features(raw[:, 10:], labels, stored[0], spec))
    answers = as_rows(ask(teachers.client(served, spec), cut(rows, 29), view), rows)
    wanted = torch.cat(expected, dim=1).numpy()
    assert answers.shape == wanted.shape
    np.testing.assert_allclose(answers.astype(np.float32), wanted, rtol=2e-3, atol=2e-3)


def test_a_rectified_and_a_plain_question_share_one_forward(
    teachers: Any, served: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    view, before = new_view(), total(served[0], "forwards")
    for spec in (PLAIN, Rectifier(tau_prior=1.0, exchange=True), BOTH):
        ask(teachers.client(served, spec), cut(rows, 64), view)
    assert total(served[0], "forwards") - before == len(rows)


def test_questions_that_make_no_sense_are_refused(
    served: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    (group, teacher_hash), batch = served, next(cut(rows, 8))
    pixels = ray.put(Pixels(batch.images_BHWC))
    right = request_for(teacher_hash, batch, new_view(), PLAIN, pixels)
    unequal = replace(right, view_index=right.view_index[:4])
    foreign = replace(right, sample_ids=batch.sample_ids + 10**9)
    for request, message in (
        (replace(right, teacher_hash="0" * 32), "asked teacher 0{32}, this is"),
        (unequal, r"asked for \(8,\) samples in \(4,\) views"),
        (foreign, "is not in the shards"),
    ):
        with pytest.raises(ray.exceptions.RayTaskError, match=message):
            ray.get(group.replicas[0].targets.remote(request))
    assert len(ray.get(group.replicas[0].targets.remote(right)).logits) == 8


def test_a_client_raises_the_teachers_error_as_it_is(teachers: Any, served: Any, rows: Batch) -> None:
    client = teachers.client((served[0], "f" * 32), PLAIN)
    with pytest.raises(TeacherError) as caught:
        list(client.stream(cut(rows, 8)))
    assert type(caught.value) is TeacherError
    assert str(caught.value).startswith(f"student tester asked teacher {'f' * 32}, this is {served[1]}")
    assert client.stats.retries == 0, "asking again would not help"


def test_features_before_calibration_are_refused_and_logits_are_not(
    teachers: Any, rows: Batch, tmp_path: Path
) -> None:
    group = teachers.open(teachers.specs(tmp_path))
    info = ray.get(group.replicas[0].info.remote())
    assert info.accuracy is None
    early = (group, info.teacher_hash)
    with pytest.raises(TeacherError, match="before the calibration pass"):
        ask(teachers.client(early, BOTH), cut(rows, 32), 0)
    assert len(ask(teachers.client(early, PLAIN), cut(rows, 32), 0)) == len(rows)
    group.close()


def test_self_test_refuses_a_random_teacher_and_writes_down_why(
    teachers: Any, random_weights: Path, tmp_path: Path
) -> None:
    specs = teachers.specs(tmp_path, weights=str(random_weights))
    group = teachers.open(specs)
    with pytest.raises(TeacherError, match=r"self-test: the teacher is right on \d+\.\d% .* at least 90\.0%"):
        group.start(teachers.shards, PROBE, min_accuracy=0.9)
    group.close()
    record = json.loads((tmp_path / "teacher/selftest.json").read_text())
    assert record["train_accuracy_balanced"] < 0.5 < record["min_accuracy"]


def test_replicas_with_different_weights_are_refused(
    teachers: Any, random_weights: Path, tmp_path: Path
) -> None:
    specs = teachers.specs(tmp_path, num_replicas=2)
    group = teachers.open([specs[0], replace(specs[1], weights=str(random_weights))])
    with pytest.raises(TeacherError, match="replicas hold different teachers"):
        group.start(teachers.shards, PROBE, min_accuracy=0.0)
    group.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "/nowhere/model.safetensors"}, "/nowhere/model.safetensors does not exist"),
        ({"class_counts": (5,) * 7}, "was trained for 10 classes, the dataset has 7"),
    ],
    ids=["missing weights", "other classes"],
)
def test_a_teacher_that_cannot_start_says_why_in_one_line(
    teachers: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    group = teachers.open(teachers.specs(tmp_path, **changes))
    with pytest.raises(TeacherError, match=message) as caught:
        group.start(teachers.shards, PROBE, min_accuracy=0.0)
    assert "\n" not in str(caught.value)


def test_a_store_that_spills_answers_the_same_within_its_budget(
    teachers: Any, served: Any, rows: Batch, tmp_path: Path
) -> None:
    budget = 16 << 10
    small = teachers.start(teachers.specs(tmp_path, memory_bytes=budget, disk_bytes=1 << 20))
    try:
        for _ in range(2):
            for view in (0, 1):
                expected = ask(teachers.client(served, BOTH), cut(rows, 20), view)
                assert ask(teachers.client(small, BOTH), cut(rows, 20), view) == expected
        assert total(small[0], "forwards") == total(small[0], "unique_views") == 2 * len(rows)
    finally:
        small[0].close()
    lines = [json.loads(line) for line in (tmp_path / "teacher/stats-0.jsonl").read_text().splitlines()]
    assert 0 < max(line["store_memory_bytes"] for line in lines) <= budget
    assert max(line["store_disk_bytes"] for line in lines) > budget
    assert not list((tmp_path / "store").rglob("page-*")), "no page is left behind"


def test_only_processes_that_ask_receive_targets_and_only_a_driver_that_asks_counts_them(
    teachers: Any, either: Any, rows: Batch, new_view: Callable[[], int]
) -> None:
    view, before = new_view(), dict(messages.RECEIVED_BYTES)

    @ray.remote(num_cpus=0.25)
    def student(client: TeacherClient, size: int) -> int:
        before = messages.RECEIVED_BYTES["targets"]
        ask(client, cut(rows, size), view)
        return messages.RECEIVED_BYTES["targets"] - before

    got = ray.get([student.remote(teachers.client(either, PLAIN), size) for size in (16, 40)])
    assert got == [len(rows) * 20] * 2, "ten float16 logits per sample"
    assert before == messages.RECEIVED_BYTES
    ask(teachers.client(either, PLAIN), cut(rows, 32), view)
    assert messages.RECEIVED_BYTES["targets"] - before["targets"] == len(rows) * 20
