"""Calibration: what it derives, what it stores, and priors of every kind computed once, whoever asks."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths import calibration as calibration_module
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.priors import PriorKind, balanced_priors
from krd_ray.maths.rectify import Rectifier, rectify_features

NUM_CLASSES, NUM_DIMS, NUM_THREADS = 7, 9, 8
COUNTS = torch.tensor([500, 200, 80, 40, 20, 10, 5])
KINDS = get_args(PriorKind)
TENSORS = ("class_counts", "class_means", "priors", "centre", "mean_norm")


def _calibration(num_dims: int = NUM_DIMS) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration.from_means(2 * torch.randn(NUM_CLASSES, num_dims, generator=generator) + 5, COUNTS)


def _assert_same(one: Calibration, other: Calibration) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for kind in KINDS:
        assert torch.equal(one.priors_of(kind), other.priors_of(kind)), kind


# ---- what it derives and stores


def test_every_tensor_of_the_record_is_compared_here() -> None:
    names = {field.name for field in dataclasses.fields(Calibration)}
    assert {name for name in names if not name.startswith("_")} == set(TENSORS)


def test_calibration_survives_its_dictionary() -> None:
    before = _calibration()
    _assert_same(Calibration.from_dict(before.to_dict()), before)


@pytest.mark.parametrize("num_dims", [4, NUM_DIMS])
def test_file_of_three_tensors_gives_priors_of_every_kind(num_dims: int, tmp_path: Path) -> None:
    before = _calibration(num_dims)
    before.priors_of("class_mean")  # what was asked for before does not change the file
    save_file(before.to_dict(), tmp_path / "c.safetensors")
    stored = load_file(tmp_path / "c.safetensors")
    assert stored.keys() == {"class_counts", "class_means", "priors"}
    after = Calibration.from_dict(stored)
    fitting = [kind for kind in KINDS if num_dims >= NUM_CLASSES - 1 or kind != "simplex"]
    for kind in fitting:
        assert torch.equal(after.priors_of(kind), before.priors_of(kind)), kind


def test_stored_priors_are_taken_as_they_are() -> None:
    tensors = _calibration().to_dict()
    tensors["priors"] = tensors["priors"].flip(0)
    after = Calibration.from_dict(tensors)
    assert torch.equal(after.priors_of("auto"), tensors["priors"])
    assert torch.equal(after.priors_of("simplex"), tensors["priors"])


def _pickled(calibration: Calibration) -> Calibration:
    back: Calibration = pickle.loads(pickle.dumps(calibration))  # noqa: S301 - written above
    return back


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled, lambda calibration: calibration.to("cpu")])
def test_copies_are_equal_and_answer_on_their_own(again: Callable[[Calibration], Calibration]) -> None:
    before = _calibration()
    kept = before.priors_of("sphere")
    after = again(before)
    assert torch.equal(after._found["sphere"], kept)
    assert after._locks["auto"] is not before._locks["auto"]
    _assert_same(after, before)


def test_calibration_weighs_every_class_the_same() -> None:
    calibration = _calibration()
    assert torch.allclose(calibration.centre, calibration.class_means.mean(dim=0))
    other = Calibration.from_means(calibration.class_means, COUNTS.flip(0))
    for kind in KINDS:
        assert torch.equal(other.priors_of(kind), calibration.priors_of(kind))


def test_unusable_calibrations_are_refused() -> None:
    means = _calibration().class_means
    with pytest.raises(DataError, match="first: class 2"):
        Calibration.from_means(means, torch.tensor([3, 1, 0, 1, 0, 1, 1]))
    with pytest.raises(ShapeError, match=r"\(7, 9\).*\(6,\)"):
        Calibration.from_means(means, COUNTS[:6])
    with pytest.raises(DataError, match="lacks priors"):
        Calibration.from_dict({"class_means": means, "class_counts": COUNTS})
    with pytest.raises(ShapeError, match="priors"):
        Calibration.from_dict({"class_means": means, "class_counts": COUNTS, "priors": means[:, :4]})


# ---- priors of every kind


@pytest.mark.parametrize(("num_dims", "auto"), [(NUM_DIMS, "simplex"), (6, "simplex"), (5, "sphere")])
def test_auto_is_the_kind_that_fits(num_dims: int, auto: PriorKind) -> None:
    calibration = _calibration(num_dims)
    assert calibration.priors_of("auto") is calibration.priors_of(auto) is calibration.priors


@pytest.mark.parametrize("kind", KINDS)
def test_priors_are_those_of_the_centred_class_means(kind: PriorKind) -> None:
    calibration = _calibration()
    want = balanced_priors(calibration.class_means - calibration.centre, kind)
    assert torch.equal(calibration.priors_of(kind), want)


def test_a_simplex_that_does_not_fit_is_refused_each_time_with_what_to_choose() -> None:
    calibration = _calibration(num_dims=5)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"at least 6 .* has 5\. Set loss\.rrd\.prior to auto or sphere"
        ):
            calibration.priors_of("simplex")
    assert calibration.priors_of("auto").shape == (NUM_CLASSES, 5)


def test_replicas_with_the_same_means_hold_the_same_priors() -> None:
    replicas = [_calibration() for _ in range(3)]
    orders = [("sphere", "class_mean"), ("class_mean", "sphere"), ("sphere",)]
    for replica, order in zip(replicas, orders, strict=True):
        for kind in order:
            replica.priors_of(kind)  # type: ignore[arg-type]
    for other in replicas[1:]:
        _assert_same(other, replicas[0])


# ---- computed once


class Counted:
    """`balanced_priors`, slow enough for threads to meet; counts calls per kind and can fail or wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.failures = 0
        self.gates: dict[str, threading.Event] = {}
        self.entered = threading.Event()
        monkeypatch.setattr(calibration_module, "balanced_priors", self)

    def __call__(self, means: Any, kind: PriorKind = "auto", seed: int = 0) -> Any:
        self.calls.append(kind)
        self.entered.set()
        if kind in self.gates:
            assert self.gates[kind].wait(timeout=20)
        time.sleep(0.02)
        if self.failures > 0:
            self.failures -= 1
            raise DataError("not this time")
        return balanced_priors(means, kind, seed)


def _ask_together(ask: Callable[[int], Any]) -> list[Any]:
    """The answers of threads that start at the same moment."""
    together = threading.Barrier(NUM_THREADS)

    def ask_one(thread: int) -> Any:
        together.wait(timeout=20)
        return ask(thread)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(ask_one, range(NUM_THREADS)))


@pytest.mark.parametrize("kind", ["sphere", "class_mean"])
def test_threads_that_ask_at_once_share_one_computation(
    kind: PriorKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, counted = _calibration(), Counted(monkeypatch)
    answers = _ask_together(lambda _: calibration.priors_of(kind))
    assert counted.calls == [kind]
    assert all(answer is answers[0] for answer in answers)


def test_requests_of_all_kinds_at_once_get_what_one_thread_would(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = _calibration(), _calibration()
    specs = [Rectifier(features="balanced", prior=kind) for kind in KINDS]
    labels = torch.arange(NUM_CLASSES)
    want = [rectify_features(alone.class_means + 1, labels, alone, spec) for spec in specs]
    counted = Counted(monkeypatch)
    answers = _ask_together(
        lambda thread: [
            rectify_features(shared.class_means + 1, labels, shared, specs[(thread + k) % len(specs)])
            for k in range(len(specs))
        ]
    )
    assert sorted(counted.calls) == ["class_mean", "sphere"]
    for thread, got in enumerate(answers):
        for k, rows in enumerate(got):
            assert torch.equal(rows, want[(thread + k) % len(specs)])


def test_what_is_there_does_not_wait_for_what_is_being_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, counted = _calibration(), Counted(monkeypatch)
    counted.gates["sphere"] = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(calibration.priors_of, "sphere")
        assert counted.entered.wait(timeout=20)
        try:
            for kind in ("auto", "class_mean"):
                assert threads.submit(calibration.priors_of, kind).result(timeout=20) is not None
            assert not slow.done()
        finally:
            counted.gates["sphere"].set()
        assert slow.result(timeout=20).shape == (NUM_CLASSES, NUM_DIMS)


def test_a_failed_computation_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, counted = _calibration(), Counted(monkeypatch)
    counted.failures = 1
    with pytest.raises(DataError, match="not this time"):
        calibration.priors_of("sphere")
    assert calibration.priors_of("sphere").shape == (NUM_CLASSES, NUM_DIMS)
    assert counted.calls == ["sphere", "sphere"]
