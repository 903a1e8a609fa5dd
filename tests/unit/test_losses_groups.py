"""What the losses over groups of classes promise: how their parts add up, and what happens to a leaning teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ConfigError
from krd_ray.maths.class_groups import dkd, frequency_groups, ltkd
from krd_ray.maths.distillation import kd
from tests.unit.loss_references import close, draw, logits

B, C, T = 6, 7, 3.0


# ---- dkd


def test_dkd_with_the_others_mass_as_weight_is_kd() -> None:
    z_s, z_t, y, _ = logits(1)
    for i in range(B):
        row = slice(i, i + 1)
        others = 1 - F.softmax(z_t[row] / T, dim=1)[0, y[i]].item()
        split = dkd(z_s[row], z_t[row], y[row], temperature=T, alpha=1.0, beta=others)
        close(split, kd(z_s[row], z_t[row], temperature=T), rel=1e-4)


def test_dkd_parts_see_the_label_or_the_others_but_not_both() -> None:
    _, z_t, y, _ = logits(2)
    at_label = F.one_hot(y, C)
    surer = z_t + 2.0 * at_label
    assert dkd(surer, z_t, y, temperature=T, alpha=0.0, beta=8.0) < 1e-5
    assert dkd(surer, z_t, y, temperature=T, alpha=1.0, beta=0.0) > 0.1
    others = z_t.masked_fill(at_label.bool(), -torch.inf) / T
    mixed = torch.where(at_label.bool(), z_t / T, others.logsumexp(1, keepdim=True) - math.log(C - 1)) * T
    assert dkd(mixed, z_t, y, temperature=T, alpha=1.0, beta=0.0) < 1e-5
    assert dkd(mixed, z_t, y, temperature=T, alpha=0.0, beta=8.0) > 0.1


def test_dkd_parts_add_up_with_their_weights() -> None:
    z_s, z_t, y, _ = logits(3)
    first = dkd(z_s, z_t, y, temperature=T, alpha=1.0, beta=0.0)
    second = dkd(z_s, z_t, y, temperature=T, alpha=0.0, beta=1.0)
    close(dkd(z_s, z_t, y, temperature=T, alpha=0.7, beta=8.0), 0.7 * first + 8.0 * second)


def test_dkd_of_two_classes_has_no_second_part_and_of_one_is_refused() -> None:
    z, y = torch.tensor([[0.3, -1.0]]), torch.tensor([1])
    close(dkd(z, 2 * z, y, temperature=T, alpha=1.0, beta=8.0), kd(z, 2 * z, temperature=T))
    with pytest.raises(ConfigError, match=r"loss\.dkd needs at least 2 classes, the dataset has 1"):
        dkd(z[:, :1], z[:, :1], torch.tensor([0]), temperature=T, alpha=1.0, beta=8.0)


# ---- ltkd


def even_teacher(seed: int, counts: Tensor) -> Tensor:
    """A teacher that gives each group a third of the mass in every sample, at temperature T."""
    z = draw(seed)["teacher_logits"]
    for group in frequency_groups(counts):
        z[:, group] = T * F.log_softmax(z[:, group] / T, dim=1)
    return z


def test_ltkd_is_kd_where_nothing_is_rescaled() -> None:
    z_s, _, _, n = logits(4)
    z_t = even_teacher(4, n)
    close(ltkd(z_s, z_t, n, temperature=T, alpha=1.0, beta=1 / 3), kd(z_s, z_t, temperature=T), rel=1e-4)


def test_ltkd_parts_add_up_with_their_weights() -> None:
    z_s, z_t, _, n = logits(5)
    between = ltkd(z_s, z_t, n, temperature=T, alpha=1.0, beta=0.0)
    within = ltkd(z_s, z_t, n, temperature=T, alpha=0.0, beta=1.0)
    close(ltkd(z_s, z_t, n, temperature=T, alpha=0.4, beta=3.0), 0.4 * between + 3.0 * within)


def test_ltkd_takes_a_leaning_to_the_head_out_of_the_teacher() -> None:
    _, _, _, n = logits(6)
    z_t = even_teacher(6, n)
    leaning = z_t.clone()
    leaning[:, frequency_groups(n)[0]] += 4.0
    for teacher in (z_t, leaning):
        assert ltkd(z_t, teacher, n, temperature=T, alpha=1.0, beta=1.0).abs() < 1e-5
    assert kd(z_t, leaning, temperature=T) > 0.1


def test_ltkd_group_of_little_mass_counts_as_much_as_the_others() -> None:
    _, _, _, n = logits(7)
    tail = frequency_groups(n)[2]
    z_t = even_teacher(7, n)
    faint = z_t.clone()
    faint[:, tail] -= 20.0
    z_s = z_t.clone()
    z_s[:, tail] = z_s[:, tail].flip(1)
    within = [ltkd(z_s, teacher, n, temperature=T, alpha=0.0, beta=1.0) for teacher in (z_t, faint)]
    close(within[0], within[1], rel=1e-4)
    assert within[0] > 0.01


@pytest.mark.parametrize(("num_classes", "sizes"), [(3, [1, 1, 1]), (10, [3, 4, 3]), (100, [33, 34, 33])])
def test_groups_share_out_the_classes_by_count(num_classes: int, sizes: list[int]) -> None:
    counts = torch.randperm(num_classes) + 1
    groups = frequency_groups(counts)
    assert [len(group) for group in groups] == sizes
    assert sorted(torch.cat(groups).tolist()) == list(range(num_classes))
    head, medium, tail = (counts[group] for group in groups)
    assert head.min() > medium.max()
    assert medium.min() > tail.max()


def test_no_group_is_ever_empty_and_too_few_classes_are_refused() -> None:
    for num_classes in range(3, 60):
        groups = frequency_groups(torch.ones(num_classes))
        assert min(len(group) for group in groups) >= 1
        assert torch.equal(torch.cat(groups), torch.arange(num_classes)), "equal counts keep their order"
    with pytest.raises(ConfigError, match=r"loss\.ltkd needs at least 3 classes, the dataset has 2"):
        frequency_groups(torch.ones(2))
