"""What the terms over rectified targets promise: spaces, weights and gates of logits, length of features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.maths.distillation import bkd, kd
from krd_ray.maths.rectified_terms import lrd, nd, rrd
from tests.unit.loss_references import LRD, close, draw, logits

B, C = 6, 7
EQUAL = torch.full((C,), 50)


# ---- lrd


def lrd_of(seed: int, **changes: Any) -> Tensor:
    t = draw(seed)
    counts = changes.pop("class_counts", t["class_counts"])
    return lrd(t["student_logits"], t["rectified_logits"], t["labels"], counts, **(LRD | changes))


def test_lrd_is_kd_from_rectified_logits_unless_more_is_asked() -> None:
    t = draw(16)
    close(lrd_of(16), kd(t["student_logits"], t["rectified_logits"], temperature=2.0))


@pytest.mark.parametrize("tau_prior", [0.5, 1.0, 2.0])
def test_lrd_spaces_differ_by_the_prior_alone(tau_prior: float) -> None:
    for changes in ({}, {"gate": "confidence"}, {"weighting": "effective_number"}):
        changes = changes | {"tau_prior": tau_prior}
        close(
            lrd_of(17, class_counts=EQUAL, space="long_tailed", **changes),
            lrd_of(17, class_counts=EQUAL, space="balanced", **changes),
        )
        assert lrd_of(17, space="long_tailed", **changes).item() != pytest.approx(
            lrd_of(17, space="balanced", **changes).item(), rel=1e-3
        )
    close(lrd_of(17, space="long_tailed", tau_prior=0.0), lrd_of(17, space="balanced"))


def test_lrd_in_the_long_tailed_space_gives_the_teacher_its_own_logits_back() -> None:
    z_s, z_t, y, n = logits(18)
    log_prior = (n / n.sum()).log()
    got = lrd(z_s, z_t - 0.7 * log_prior, y, n, **(LRD | {"space": "long_tailed", "tau_prior": 0.7}))
    close(got, kd(z_s + 0.7 * log_prior, z_t, temperature=2.0))


def test_lrd_weighted_by_effective_number_is_bkd_from_rectified_logits() -> None:
    t = draw(19)
    expected = bkd(t["student_logits"], t["rectified_logits"], t["class_counts"], temperature=2.0, beta=0.99)
    close(lrd_of(19, weighting="effective_number"), expected)
    close(lrd_of(19, weighting="effective_number", class_counts=EQUAL), lrd_of(19))


def test_lrd_gate_weighs_a_sample_by_the_targets_belief_in_its_label() -> None:
    t = draw(20)
    z_s, z_r, y, n = t["student_logits"], t["rectified_logits"], t["labels"], t["class_counts"]
    belief = F.softmax(z_r, dim=1).gather(1, y[:, None])[:, 0]
    for space in ("balanced", "long_tailed"):
        rows = [slice(i, i + 1) for i in range(B)]
        alone = [lrd(z_s[r], z_r[r], y[r], n, **(LRD | {"space": space})) for r in rows]
        close(lrd_of(20, gate="confidence", space=space), (belief * torch.stack(alone)).mean())
    sure = z_r + 60.0 * F.one_hot(y, C)
    gated = lrd(z_s, sure, y, n, **(LRD | {"gate": "confidence"}))
    close(gated, lrd(z_s, sure, y, n, **LRD))


# ---- rrd, nd


def test_cosine_ignores_length_and_spans_zero_to_two() -> None:
    f = draw(21)["projected_features"]
    assert rrd(3 * f, 0.1 * f, form="cosine").abs() < 1e-6
    assert rrd(f, -f, form="cosine").item() == pytest.approx(2.0)


def test_norm_aware_is_the_cosine_once_the_student_is_as_long() -> None:
    t = draw(22)
    f, r = t["projected_features"], t["rectified_features"]
    long = 10 * f
    assert (long.norm(dim=1) > r.norm(dim=1)).all()
    close(rrd(long, r, form="norm_aware"), rrd(f, r, form="cosine"))
    close(rrd(100 * f, r, form="norm_aware"), rrd(f, r, form="cosine"))


def test_norm_aware_pays_for_what_is_missing_in_length() -> None:
    r = draw(23)["rectified_features"]
    for share in (0.0, 0.25, 0.5, 1.0):
        assert rrd(share * r, r, form="norm_aware").item() == pytest.approx(1 - share, abs=1e-6)
        assert nd(share * r, r).item() == pytest.approx(1 - share, abs=1e-6)


def test_nd_is_the_norm_aware_form_on_its_own_target() -> None:
    t = draw(24)
    f, r = t["projected_features"], t["rectified_features"]
    assert torch.equal(nd(f, r), rrd(f, r, form="norm_aware"))
    direction, length = F.normalize(draw(25)["rectified_features"], dim=1), 3.0
    longer = torch.maximum(f.norm(dim=1), torch.tensor(length))
    close(nd(f, length * direction), (1 - (f * direction).sum(dim=1) / longer).mean())


@pytest.mark.parametrize("form", ["cosine", "norm_aware"])
def test_features_of_zero_length_are_worth_one_and_have_a_finite_gradient(form: Any) -> None:
    zero = torch.zeros(2, 4, requires_grad=True)
    for target in (torch.ones(2, 4), torch.zeros(2, 4)):
        zero.grad = None
        loss = rrd(zero, target, form=form)
        loss.backward()
        assert loss.item() == 1.0
        assert zero.grad is not None
        assert torch.isfinite(zero.grad).all()
