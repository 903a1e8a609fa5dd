"""Answers whether network, projector, optimiser, schedule and the reductions over ranks do what they say.

Does not start Ray.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.config import TrainConfig
from krd_ray.train.reduce import all_finite, coverage, sum_over_ranks
from krd_ray.train.student import build_optimizer, build_student, lr_factor

CPU = torch.device("cpu")


# student


@given(
    schedule=st.sampled_from(["cosine", "step", "constant"]),
    epochs=st.integers(1, 50),
    warmup=st.floats(0, 60),
    share=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_learning_rate_never_exceeds_its_setting(
    schedule: Any, epochs: int, warmup: float, share: float
) -> None:
    factor = lr_factor(
        TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=warmup, milestones=(epochs // 2,))
    )
    assert 0 <= factor(share * epochs) <= 1


def test_schedules_by_hand() -> None:
    warm = lr_factor(TrainConfig(epochs=12, warmup_epochs=2))
    assert [warm(epoch) for epoch in (0.0, 1.0, 2.0, 7.0, 12.0)] == pytest.approx(
        [0.0005, 0.5005, 1.0, 0.5, 0.0]
    )
    steps = lr_factor(TrainConfig(epochs=9, schedule="step", milestones=(6, 3), gamma=0.5))
    assert [steps(epoch) for epoch in (0.0, 2.999, 3.0, 5.9, 6.0, 8.9)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert lr_factor(TrainConfig(schedule="constant"))(57.0) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_normalisation_are_not_decayed(name: Any) -> None:
    student = build_student("resnet8", num_classes=4, side=8, seed=0, teacher_dim=6)
    optimizer = build_optimizer(student, TrainConfig(optimizer=name, weight_decay=0.1))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay_of) == len(list(student.parameters()))
    for parameter_name, parameter in student.named_parameters():
        one_dimensional = "bn" in parameter_name or "bias" in parameter_name or parameter.ndim == 1
        assert decay_of[id(parameter)] == (0.0 if one_dimensional else 0.1), parameter_name
    assert type(optimizer).__name__.lower() == name


def test_training_without_momentum_is_plain_gradient_descent() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, TrainConfig(momentum=0, nesterov=False, weight_decay=0, lr=0.5))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)


def test_student_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    settings_: dict[str, Any] = {"num_classes": 4, "side": 8, "teacher_dim": 6}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_student("digits_net_4", seed=3, **settings_).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_student("digits_net_4", seed=3, **settings_).state_dict()
    other = build_student("digits_net_4", seed=4, **settings_).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projector.weight"], other["projector.weight"])
    assert not torch.equal(first["net.head.weight"], other["net.head.weight"])


def test_projector_gives_the_teachers_width_and_is_left_out_without_one() -> None:
    view = torch.zeros(2, 3, 8, 8)
    logits, projected = build_student("digits_net_4", num_classes=4, side=8, seed=0, teacher_dim=6)(view)
    assert (tuple(logits.shape), tuple(projected.shape)) == ((2, 4), (2, 6))
    alone = build_student("digits_net_4", num_classes=4, side=8, seed=0, teacher_dim=None)
    assert alone(view)[1] is None
    assert not [name for name in alone.state_dict() if "projector" in name]


# reduce


def test_coverage_counts_seen_missed_doubled_and_left_out() -> None:
    ids = np.array([2, 4, 6, 8, 10, 12])
    once = np.ones(6, np.int64)
    whole = coverage(ids, once - (ids == 10), [np.array([12, 2]), np.array([4, 6, 8])], [10], CPU)
    assert whole == {"seen": 5, "missed": 0, "doubled": 0, "left_out": 1, "left_out_ids": [10]}
    expected = once - np.isin(ids, [8, 10])
    torn = coverage(ids, expected, [np.array([2, 2, 4]), np.array([10])], [10, 8], CPU)
    assert torn == {"seen": 3, "missed": 2, "doubled": 2, "left_out": 2, "left_out_ids": [8, 10]}
    assert coverage(ids, once, [], [], CPU)["missed"] == 6


def test_coverage_is_counted_against_the_copies_that_the_plan_wants() -> None:
    ids, expected = np.array([2, 4, 6]), np.array([3, 0, 1])
    assert coverage(ids, expected, [np.array([2, 6, 2]), np.array([2])], [], CPU) == {
        "seen": 2, "missed": 0, "doubled": 0, "left_out": 0, "left_out_ids": [],
    }  # fmt: skip
    torn = coverage(ids, expected, [np.array([2, 4]), np.array([4, 6, 6])], [2, 2], CPU)
    assert torn == {"seen": 3, "missed": 2, "doubled": 3, "left_out": 2, "left_out_ids": [2, 2]}


def test_one_worker_alone_is_its_own_sum() -> None:
    assert sum_over_ranks(torch.tensor([1.0, 2.0]), CPU).tolist() == [1.0, 2.0]
    assert all_finite([1.0, -2.0], CPU)
    assert not all_finite([1.0, math.nan], CPU)
    assert not all_finite([math.inf], CPU)
