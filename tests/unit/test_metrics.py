"""Metrics: torchmetrics as independent reference, and counts that add up however the data is split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from krd_ray.errors import ShapeError
from krd_ray.maths.metrics import NUM_BINS, EvalCounts, count_batch
from krd_ray.models.torchvision_import import make_torchvision_importable

make_torchvision_importable()  # torchmetrics imports torchvision

from torchmetrics.functional.classification import (  # noqa: E402
    multiclass_accuracy,
    multiclass_calibration_error,
)

C, N = 6, 500
COUNTS = torch.tensor([400, 150, 100, 20, 19, 5])


def _predictions(seed: int = 0, num: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (num,), generator=generator)
    logits = torch.randn(num, C, generator=generator)
    logits[torch.arange(num), labels] += torch.linspace(3, 0.5, C)[labels]
    teacher = logits + 2 * torch.randn(num, C, generator=generator)
    return logits, labels, teacher


def _fields(counts: EvalCounts) -> dict[str, Tensor]:
    return dict(vars(counts))


def test_accuracies_equal_torchmetrics() -> None:
    logits, labels, _ = _predictions()
    counts = count_batch(logits, labels, C)
    rows = counts.metrics(COUNTS)
    per_class = multiclass_accuracy(logits, labels, C, average="none")
    assert counts.per_class_accuracy() == pytest.approx(per_class.tolist())
    assert rows["top1"] == pytest.approx(multiclass_accuracy(logits, labels, C, average="micro").item())
    assert rows["balanced"] == pytest.approx(multiclass_accuracy(logits, labels, C, average="macro").item())
    assert rows["worst_class"] == pytest.approx(per_class.min().item())
    assert rows["harmonic_mean"] == pytest.approx(C / (1 / per_class).sum().item())
    assert rows["num_samples"] == N


def test_shot_groups_pool_the_samples_of_their_classes() -> None:
    logits, labels, _ = _predictions()
    rows = count_batch(logits, labels, C).metrics(COUNTS)
    for group, classes in {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}.items():
        inside = torch.isin(labels, torch.tensor(classes))
        want = multiclass_accuracy(logits[inside], labels[inside], C, average="micro")
        assert rows[group] == pytest.approx(want.item()), group


def test_shot_groups_of_a_balanced_split_are_means_over_classes() -> None:
    logits, _, _ = _predictions(num=C * 50)
    counts = count_batch(logits, torch.arange(C * 50) % C, C)
    accuracy, rows = counts.per_class_accuracy(), counts.metrics(COUNTS)
    assert rows["many"] == pytest.approx(np.mean(accuracy[:2]))
    assert rows["few"] == pytest.approx(np.mean(accuracy[4:]))
    assert rows["top1"] == pytest.approx(rows["balanced"])


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_calibration_error_equals_torchmetrics(scale: float) -> None:
    logits, labels, _ = _predictions()
    rows = count_batch(scale * logits, labels, C).metrics(COUNTS)
    want = multiclass_calibration_error(
        (scale * logits).softmax(dim=1), labels, C, n_bins=NUM_BINS, norm="l1"
    )
    assert rows["ece"] == pytest.approx(want.item(), abs=1e-5)
    assert rows["ece"] > 0.001


def test_certain_predictions_fall_into_the_last_bin() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    counts = count_batch(100 * torch.eye(C)[torch.tensor([0, 1, 2, 5])], labels, C)
    assert counts.bin_total_K.tolist() == [0] * 14 + [4]
    assert counts.metrics(COUNTS)["ece"] == pytest.approx(0.25)


def test_loss_is_the_mean_cross_entropy() -> None:
    logits, labels, _ = _predictions()
    p = np.exp(logits.double().numpy())
    want = -np.log(p[np.arange(N), labels] / p.sum(axis=1)).mean()
    assert count_batch(logits.double(), labels, C).metrics(COUNTS)["loss"] == pytest.approx(want, rel=1e-6)


def test_agreement_is_reported_only_if_counted() -> None:
    logits, labels, teacher = _predictions()
    rows = count_batch(logits, labels, C, teacher).metrics(COUNTS)
    assert rows["agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).double().mean().item())
    assert "agreement" not in count_batch(logits, labels, C).metrics(COUNTS)
    half = count_batch(logits[:100], labels[:100], C, teacher[:100]) + count_batch(
        logits[100:], labels[100:], C
    )
    same = (logits[:100].argmax(1) == teacher[:100].argmax(1)).double().mean().item()
    assert half.metrics(COUNTS)["agreement"] == pytest.approx(same)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=8), seed=st.integers(0, 1000))
def test_batches_and_ranks_add_up_to_a_single_pass(cuts: list[int], seed: int) -> None:
    logits, labels, teacher = _predictions(seed)
    whole = count_batch(logits, labels, C, teacher)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    edges = [0, *sorted(cuts), N]
    parts = [
        count_batch(logits[chosen], labels[chosen], C, teacher[chosen])
        for chosen in (order[start:stop] for start, stop in itertools.pairwise(edges))
    ]
    merged = sum(parts[1:], start=parts[0])
    reduced = EvalCounts.from_tensor(torch.stack([part.to_tensor() for part in parts]).sum(dim=0))
    for name, want in _fields(whole).items():
        for got in (_fields(merged)[name], _fields(reduced)[name]):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert torch.equal(got, want) if want.dtype == torch.int64 else torch.allclose(got, want), name
    assert merged.metrics(COUNTS) == pytest.approx(whole.metrics(COUNTS), rel=1e-9)


def test_flat_vector_brings_everything_back() -> None:
    counts = count_batch(*_predictions()[:2], C, _predictions()[2])
    vector = counts.to_tensor()
    assert vector.dtype == torch.float64
    assert vector.ndim == 1
    after = EvalCounts.from_tensor(vector)
    for name, want in _fields(counts).items():
        assert torch.equal(_fields(after)[name], want), name
    big = counts.to_tensor()
    big[0] = 2**53 - 1
    assert EvalCounts.from_tensor(big).correct_C[0] == 2**53 - 1


def test_zeros_are_neutral() -> None:
    counts = count_batch(*_predictions()[:2], C)
    assert torch.equal((counts + EvalCounts.zeros(C)).to_tensor(), counts.to_tensor())


def test_nothing_counted_gives_none_not_nan() -> None:
    rows = EvalCounts.zeros(C).metrics(COUNTS)
    assert rows.pop("num_samples") == 0
    assert set(rows) == {
        "top1",
        "many",
        "medium",
        "few",
        "balanced",
        "worst_class",
        "harmonic_mean",
        "ece",
        "loss",
    }
    assert all(value is None for value in rows.values())


def test_classes_and_groups_without_samples_are_left_out() -> None:
    logits = torch.eye(C)[torch.tensor([0, 1, 0, 2])]
    counts = count_batch(logits, torch.tensor([0, 0, 0, 2]), C)
    assert counts.per_class_accuracy() == [pytest.approx(2 / 3), None, 1.0, None, None, None]
    rows = counts.metrics(COUNTS)
    assert rows["few"] is None
    assert rows["medium"] == 1.0
    assert rows["balanced"] == pytest.approx(5 / 6)
    assert rows["worst_class"] == pytest.approx(2 / 3)
    assert rows["harmonic_mean"] == pytest.approx(0.8)


def test_one_hopeless_class_takes_the_harmonic_mean_to_zero() -> None:
    rows = count_batch(torch.eye(C)[torch.zeros(C, dtype=torch.int64)], torch.arange(C), C).metrics(COUNTS)
    assert rows["harmonic_mean"] == 0
    assert rows["worst_class"] == 0
    assert rows["balanced"] == pytest.approx(1 / C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_accepted(dtype: torch.dtype) -> None:
    logits, labels, _ = _predictions()
    rows = count_batch(logits.to(dtype), labels, C).metrics(COUNTS)
    assert rows["loss"] == pytest.approx(count_batch(logits, labels, C).metrics(COUNTS)["loss"], rel=0.01)


def test_wrong_shapes_are_refused() -> None:
    logits, labels, teacher = _predictions()
    with pytest.raises(ShapeError, match=r"\(500, 6\).*\[B, 7\]"):
        count_batch(logits, labels, 7)
    with pytest.raises(ShapeError, match=r"\(499,\)"):
        count_batch(logits, labels[:499], C)
    with pytest.raises(ShapeError, match=r"\(500, 5\).*\(500, 6\)"):
        count_batch(logits, labels, C, teacher[:, :5])
    counts = count_batch(logits, labels, C)
    with pytest.raises(ShapeError, match="6 and over 5"):
        _ = counts + EvalCounts.zeros(5)
    with pytest.raises(ShapeError, match=r"\(5,\)"):
        counts.metrics(COUNTS[:5])
    for length in (48, 51):
        with pytest.raises(ShapeError, match="2 C"):
            EvalCounts.from_tensor(torch.zeros(length))
