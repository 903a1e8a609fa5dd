"""What each term over the teacher's distribution promises of its own: when it is KD, what it asks of a student."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from krd_ray.maths.classification import cross_entropy
from krd_ray.maths.distillation import bkd, cckd, dive, kd, knowledge_adjustment
from krd_ray.maths.listwise import pld
from tests.unit.loss_references import close, logits

B, C, T = 6, 7, 3.0
EQUAL = torch.full((C,), 50)


# ---- kd


def test_kd_gradient_scale_does_not_depend_on_the_temperature() -> None:
    z_s, z_t, _, _ = logits(0)
    norms = []
    for temperature in (5.0, 50.0):
        z = (0.01 * z_s).clone().requires_grad_()
        kd(z, 0.01 * z_t, temperature=temperature).backward()
        assert z.grad is not None
        norms.append(z.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_kd_is_a_divergence_and_not_a_cross_entropy() -> None:
    _, z_t, _, _ = logits(0)
    assert kd(z_t + 3, z_t, temperature=4.0).abs() < 1e-6
    assert kd(1.1 * z_t, z_t, temperature=4.0) > 1e-5


# ---- bkd, dive


def test_bkd_with_equal_counts_or_without_weights_is_kd() -> None:
    z_s, z_t, _, n = logits(8)
    close(bkd(z_s, z_t, EQUAL, temperature=T, beta=0.9999), kd(z_s, z_t, temperature=T))
    close(bkd(z_s, z_t, n, temperature=T, beta=0.0), kd(z_s, z_t, temperature=T))


def test_bkd_asks_for_more_of_the_tail_than_the_teacher_gives() -> None:
    _, z_t, _, n = logits(9)
    z = z_t.clone().requires_grad_()
    bkd(z, z_t, n, temperature=T, beta=0.9999).backward()
    assert z.grad is not None
    assert (z.grad[:, n.argmin()] < 0).all()
    assert (z.grad[:, n.argmax()] > 0).all()


def test_dive_without_power_is_kd_and_with_it_a_hotter_teacher() -> None:
    z_s, z_t, _, _ = logits(10)
    close(dive(z_s, z_t, temperature=T, power=1.0), kd(z_s, z_t, temperature=T))
    hotter = kd(z_s, 0.5 * z_t, temperature=T)
    close(dive(z_s, z_t, temperature=T, power=0.5), hotter)


# ---- knowledge adjustment, cckd


def test_knowledge_adjustment_of_a_teacher_that_is_right_is_kd() -> None:
    z_s, z_t, _, _ = logits(11)
    right = z_t.argmax(dim=1)
    close(knowledge_adjustment(z_s, z_t, right, temperature=T), kd(z_s, z_t, temperature=T))


def test_knowledge_adjustment_never_teaches_an_error() -> None:
    _, z_t, y, _ = logits(12)
    wrong = z_t.argmax(dim=1) != y
    assert wrong.any()
    taught = z_t.clone()
    for i in wrong.nonzero().flatten().tolist():
        top = int(z_t[i].argmax())
        taught[i, top], taught[i, y[i]] = z_t[i, y[i]], z_t[i, top]
    assert torch.equal(taught.argmax(dim=1), y)
    assert knowledge_adjustment(taught, z_t, y, temperature=T).abs() < 1e-6
    assert knowledge_adjustment(z_t, z_t, y, temperature=T) > 1e-2


def test_cckd_follows_a_sure_teacher_and_else_the_label() -> None:
    z_s, z_t, y, _ = logits(13)
    at_label = F.one_hot(y, C)
    sure, wrong = z_t + 60.0 * at_label, z_t - 60.0 * at_label
    close(cckd(z_s, sure, y, temperature=T), kd(z_s, sure, temperature=T))
    close(cckd(z_s, wrong, y, temperature=T), cross_entropy(z_s, y, torch.ones(C)))


def test_cckd_at_temperature_one_has_the_gradient_of_a_mixed_target() -> None:
    z_s, z_t, y, _ = logits(14)
    z = z_s.clone().requires_grad_()
    cckd(z, z_t, y, temperature=1.0).backward()
    p = F.softmax(z_t, dim=1)
    belief = p.gather(1, y[:, None])
    target = belief * p + (1 - belief) * F.one_hot(y, C)
    torch.testing.assert_close(z.grad, (F.softmax(z_s, dim=1) - target) / B)


# ---- pld


def test_pld_of_a_sure_teacher_is_cross_entropy() -> None:
    z_s, z_t, y, _ = logits(15)
    sure = z_t + 60.0 * F.one_hot(y, C)
    close(pld(z_s, sure, y, temperature=1.0), cross_entropy(z_s, y, torch.ones(C)))


def test_pld_likelihoods_of_all_rankings_add_up_to_one() -> None:
    z_s = torch.tensor([[0.3, -1.2, 0.9, 0.1]])
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        z_t = torch.zeros(1, 4)
        z_t[0, list(ranking)] = torch.tensor([0.0, 3.0, 2.0, 1.0])  # the label comes first though ranked last
        loss = pld(z_s, z_t, torch.tensor([ranking[0]]), temperature=1e6)  # all confidences 1 / 4
        total += math.exp(-4 * loss.item())
    assert total == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "temperature"),
    [([4.0, 3.0, 2.0, 1.0], 1.0), ([1.0, 4.0, 3.0, 2.0], 1e3)],
    ids=["right", "unsure"],
)
def test_pld_is_least_for_the_student_that_ranks_as_asked(teacher: list[float], temperature: float) -> None:
    z_t, y = torch.tensor([teacher]), torch.tensor([0])
    student = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    losses = {
        order: pld(student[:, list(order)], z_t, y, temperature=temperature).item()
        for order in itertools.permutations(range(4))
    }
    assert min(losses, key=losses.__getitem__) == (0, 1, 2, 3)


def test_pld_of_a_teacher_sure_of_an_error_hardly_weighs_the_label() -> None:
    z_s, y = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0])
    first_choice = torch.tensor([1.0, 0.0, 0.0]) @ F.log_softmax(z_s, dim=1)[0].neg()
    for error, share in ((0.0, 1 / 3), (30.0, 0.0)):
        z_t = torch.tensor([[0.0, error, 0.0]])
        rest = pld(z_s[:, 1:], z_t[:, 1:], torch.tensor([0]), temperature=1.0) * (1 - share)
        close(pld(z_s, z_t, y, temperature=1.0), share * first_choice + rest, rel=1e-4)


def test_pld_does_not_care_who_comes_last() -> None:
    z_t, y = torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([0])
    z = torch.tensor([[0.0, 0.0, -50.0]], requires_grad=True)
    pld(z, z_t, y, temperature=1.0).backward()
    assert z.grad is not None
    assert z.grad[0, 2].abs() < 1e-6
