"""What each classification loss promises of its own: its special cases, its optimum, its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from krd_ray.errors import ConfigError
from krd_ray.maths.classification import (
    balanced_softmax,
    class_balanced,
    cross_entropy,
    effective_number_weights,
    focal,
    ldam,
)
from krd_ray.maths.losses import CLASSIFICATION_LOSSES
from tests.unit.loss_references import SETTINGS, call, draw

B, C = 6, 7
ONES = torch.ones(C)


# ---- weights of the classes


def test_weights_are_those_of_torch() -> None:
    t = draw(0)
    got = cross_entropy(t["student_logits"], t["labels"], t["class_weights"])
    assert torch.equal(got, F.cross_entropy(t["student_logits"], t["labels"], weight=t["class_weights"]))
    assert cross_entropy(t["student_logits"], t["labels"], ONES).item() == pytest.approx(
        F.cross_entropy(t["student_logits"], t["labels"]).item(), rel=1e-6
    )


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_only_the_ratio_of_the_weights_matters_and_a_heavy_class_decides(name: str) -> None:
    t = draw(1)
    settings = SETTINGS[name][0]
    t["labels"] = torch.tensor([0, 1, 2, 3, 4, 0])
    got = call(name, t, settings).item()
    assert call(name, t | {"class_weights": 7 * t["class_weights"]}, settings).item() == pytest.approx(
        got, rel=1e-6
    )
    heavy = call(name, t | {"class_weights": torch.where(torch.arange(C) == 0, 1e9, 1.0)}, settings)
    rows = torch.tensor([0, 5])
    alone = t | {"labels": t["labels"][rows], "student_logits": t["student_logits"][rows]}
    assert heavy.item() == pytest.approx(call(name, alone, settings).item(), rel=1e-5)
    assert heavy.item() != pytest.approx(got, rel=1e-3)


# ---- effective number


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999, 1 - 1e-9])
def test_effective_weights_sum_to_the_number_of_classes_and_favour_the_rare(beta: float) -> None:
    counts = torch.tensor([5000, 500, 50, 5, 1])
    weights = effective_number_weights(counts, beta)
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx(5.0, rel=1e-6)
    assert (weights > 0).all()
    assert (weights.diff() >= 0).all()
    series = np.array([(beta ** np.arange(int(n))).sum() for n in counts])
    np.testing.assert_allclose(weights.numpy(), 5 / series / (1 / series).sum(), rtol=1e-5)


def test_effective_weights_go_from_equal_to_inverse_counts() -> None:
    counts = torch.tensor([100, 10, 1])
    assert torch.equal(effective_number_weights(counts, 0.0), torch.ones(3))
    assert torch.equal(effective_number_weights(torch.full((4,), 30), 0.9999), torch.ones(4))
    inverse = 3 * torch.tensor([0.01, 0.1, 1.0]) / 1.11
    torch.testing.assert_close(effective_number_weights(counts, 1 - 1e-12), inverse)


@pytest.mark.parametrize("beta", [1.0, 1.5, -0.1, float("nan")])
def test_effective_weights_refuse_beta_out_of_range(beta: float) -> None:
    with pytest.raises(ConfigError, match=r"beta must be in \[0, 1\), got"):
        effective_number_weights(torch.tensor([2, 1]), beta)


def test_class_balanced_is_cross_entropy_with_effective_weights() -> None:
    t = draw(2)
    z, y, n, w = t["student_logits"], t["labels"], t["class_counts"], t["class_weights"]
    got = class_balanced(z, y, n, w, beta=0.99)
    assert torch.equal(got, cross_entropy(z, y, w * effective_number_weights(n, 0.99)))
    assert torch.equal(class_balanced(z, y, n, w, beta=0.0), cross_entropy(z, y, w))


# ---- balanced softmax


def test_balanced_softmax_without_strength_or_with_equal_counts_is_cross_entropy() -> None:
    t = draw(3)
    z, y, w = t["student_logits"], t["labels"], t["class_weights"]
    plain = cross_entropy(z, y, w).item()
    assert balanced_softmax(z, y, t["class_counts"], w, tau=0.0).item() == plain
    for tau in (0.5, 1.0, 3.0):
        equal = balanced_softmax(z, y, torch.full((C,), 77), w, tau=tau)
        assert equal.item() == pytest.approx(plain, rel=1e-5)


def test_balanced_softmax_learns_equal_logits_from_labels_that_follow_the_prior() -> None:
    counts = torch.tensor([8, 4, 2, 1])
    labels = torch.arange(4).repeat_interleave(counts)
    z = torch.zeros(15, 4, requires_grad=True)
    balanced_softmax(z, labels, counts, torch.ones(4), tau=1.0).backward()
    assert z.grad is not None
    assert z.grad.sum(dim=0).abs().max() < 1e-7
    z.grad = None
    cross_entropy(z, labels, torch.ones(4)).backward()
    assert z.grad.sum(dim=0).abs().max() > 0.1


def test_balanced_softmax_with_strength_tau_has_the_prior_to_the_power_tau() -> None:
    t = draw(4)
    z, y, n = t["student_logits"], t["labels"], torch.tensor([1, 2, 3, 4, 5, 6, 7])
    squared = balanced_softmax(z, y, n**2, ONES, tau=1.0)
    assert balanced_softmax(z, y, n, ONES, tau=2.0).item() == pytest.approx(squared.item(), rel=1e-6)


# ---- focal


def test_focal_without_discount_is_cross_entropy_and_never_above_it() -> None:
    t = draw(5)
    z, y, w = t["student_logits"], t["labels"], t["class_weights"]
    assert focal(z, y, w, gamma=0.0).item() == pytest.approx(cross_entropy(z, y, w).item(), rel=1e-6)
    values = [focal(z, y, w, gamma=gamma).item() for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_label_is_certain(gamma: float) -> None:
    z = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    focal(z, torch.tensor([0, 1]), torch.ones(2), gamma=gamma).backward()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6


# ---- LDAM


def test_ldam_of_a_cosine_classifier_is_the_paper_to_the_letter() -> None:
    t = draw(6)
    cosines = F.normalize(t["student_logits"], dim=1)
    n, y, scale = t["class_counts"], t["labels"], 30.0
    margins = 0.5 * n.double() ** -0.25 / (n.double() ** -0.25).max()
    shifted = cosines.double() - F.one_hot(y, C) * margins
    expected = F.cross_entropy(scale * shifted, y)
    got = ldam(scale * cosines, y, n, ONES, max_margin=0.5, scale=scale)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_ldam_without_margin_is_cross_entropy_and_never_below_it() -> None:
    t = draw(7)
    z, y, n, w = t["student_logits"], t["labels"], t["class_counts"], t["class_weights"]
    plain = cross_entropy(z, y, w)
    assert torch.equal(ldam(z, y, n, w, max_margin=0.0, scale=30.0), plain)
    values = [ldam(z, y, n, w, max_margin=m, scale=30.0).item() for m in (0.0, 0.1, 0.3, 0.5)]
    assert values == sorted(values)


def test_ldam_leaves_a_linear_classifier_its_own_scale() -> None:
    t = draw(8)
    z, y, n = t["student_logits"], t["labels"], t["class_counts"]
    one = ldam(z, y, n, ONES, max_margin=0.5, scale=30.0)
    assert ldam(z, y, n, ONES, max_margin=5.0, scale=3.0).item() == pytest.approx(one.item(), rel=1e-6)


def test_ldam_asks_the_rarest_class_for_the_whole_margin_and_others_for_less() -> None:
    counts, margins = torch.tensor([10_000, 16, 1]), []
    for c in range(3):
        z = torch.full((1, 3), -1e4)
        z[0, c], z[0, (c + 1) % 3] = 1.0, 0.0
        loss = ldam(z, torch.tensor([c]), counts, torch.ones(3), max_margin=0.5, scale=10.0)
        margins.append(1.0 + torch.log(torch.expm1(loss)).item())  # loss = log(1 + exp(margin - gap))
    assert margins == pytest.approx([0.5, 2.5, 5.0], rel=1e-5)
