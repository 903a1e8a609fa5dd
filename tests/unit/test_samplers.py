"""Answers whether samplers give each class its share, by chance but without state, and leave plain epochs alone."""

from __future__ import annotations

from fractions import Fraction
from math import floor, sqrt
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.config import SamplerConfig
from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths.samplers import DRAW_COPIES, SAMPLERS, copies_in_epoch, expected_copies, view_of_copy

COUNTS = [500, 120, 31, 7, 1]
POWERS = [record.power for record in SAMPLERS.values()]
QUICK = settings(max_examples=40, deadline=None)


def samples_of(class_counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids that are not positions, and labels."""
    labels = np.repeat(np.arange(len(class_counts)), class_counts)
    return np.arange(len(labels)) * 7 + 3, labels


def copies(class_counts: list[int], *, power: float, seed: int = 0, epoch: int = 0) -> np.ndarray:
    ids, labels = samples_of(class_counts)
    return copies_in_epoch(ids, labels, class_counts, power=power, seed=seed, epoch=epoch)


def uniform(seed: int, sample: int, epoch: int) -> float:
    """The published hash in Python's own integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    return (mix(mix(mix(mix(seed) ^ DRAW_COPIES) ^ sample) ^ epoch) >> 11) / 2**53


def exact_copies(class_counts: list[int], power: int) -> list[Fraction]:
    """q_c for power 0 or 1 in exact arithmetic, from the formula as the paper's share of a class."""
    shares = [Fraction(n) ** power for n in class_counts]
    return [
        share / sum(shares) * sum(class_counts) / n for share, n in zip(shares, class_counts, strict=True)
    ]


@given(class_counts=st.lists(st.integers(1, 5000), min_size=1, max_size=30))
@QUICK
def test_expected_copies_are_the_formula_and_keep_the_epochs_length(class_counts: list[int]) -> None:
    for power in (0, 1):
        exact = [float(q) for q in exact_copies(class_counts, power)]
        np.testing.assert_allclose(expected_copies(class_counts, power), exact, rtol=1e-12)
    roots = [sqrt(n) for n in class_counts]
    by_hand = [root / sum(roots) * sum(class_counts) / n for root, n in zip(roots, class_counts, strict=True)]
    np.testing.assert_allclose(expected_copies(class_counts, 0.5), by_hand, rtol=1e-12)
    for power in POWERS:
        total = np.dot(class_counts, expected_copies(class_counts, power))
        assert total == pytest.approx(sum(class_counts), rel=1e-12)


@given(
    class_counts=st.lists(st.integers(0, 200), min_size=1, max_size=12).filter(lambda c: sum(c) > 0),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
@QUICK
def test_instance_balanced_is_exactly_one_copy_of_everything(
    class_counts: list[int], seed: int, epoch: int
) -> None:
    found = copies(class_counts, power=SAMPLERS["instance_balanced"].power, seed=seed, epoch=epoch)
    assert found.dtype == np.int64
    assert (found == 1).all()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_copies_are_the_expected_number_rounded_by_the_hash(power: float) -> None:
    ids, labels = samples_of(COUNTS)
    q = expected_copies(COUNTS, power)
    for seed, epoch in [(0, 0), (0, 9), (2**61 + 5, 3)]:
        by_hand = [
            floor(q[label]) + (uniform(seed, sample, epoch) < q[label] - floor(q[label]))
            for sample, label in zip(ids.tolist(), labels.tolist(), strict=True)
        ]
        assert copies(COUNTS, power=power, seed=seed, epoch=epoch).tolist() == by_hand


@pytest.mark.parametrize("name", ["square_root", "class_balanced"])
def test_classes_get_their_share_over_many_epochs(name: str) -> None:
    power, num_epochs = SAMPLERS[name].power, 400
    _, labels = samples_of(COUNTS)
    counted = np.stack(
        [np.bincount(labels, weights=copies(COUNTS, power=power, epoch=epoch)) for epoch in range(num_epochs)]
    )
    q = expected_copies(COUNTS, power)
    wanted = np.array(COUNTS) * q
    spread = np.sqrt(np.array(COUNTS) * (q % 1) * (1 - q % 1) / num_epochs)  # of a mean of Bernoulli draws
    assert (np.abs(counted.mean(axis=0) - wanted) <= 5 * spread + 1e-9).all()
    lengths = counted.sum(axis=1)
    assert lengths.mean() == pytest.approx(sum(COUNTS), rel=0.005)
    assert lengths.std() > 0, "the epoch's length varies a little"
    if name == "class_balanced":
        np.testing.assert_allclose(wanted, wanted[0])
    assert (np.abs(counted - np.array(COUNTS) * q) <= np.array(COUNTS)).all(), (
        "never off by more than a copy each"
    )


def test_a_sample_keeps_its_copies_whoever_else_is_asked_about() -> None:
    ids, labels = samples_of(COUNTS)
    whole = copies(COUNTS, power=0.0, seed=4, epoch=2)
    order = np.random.default_rng(0).permutation(len(ids))[:200]
    part = copies_in_epoch(ids[order], labels[order], COUNTS, power=0.0, seed=4, epoch=2)
    np.testing.assert_array_equal(part, whole[order])


def test_other_epochs_and_seeds_draw_other_samples() -> None:
    drawn = {
        copies(COUNTS, power=0.0, seed=s, epoch=e).tobytes() for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(drawn) == 4


def test_every_sample_of_the_head_has_its_turn() -> None:
    times = sum(copies([1000, 10], power=0.0, epoch=epoch) for epoch in range(20))
    assert times.min() > 0, "each is in with chance 0.505, so that missing 20 times has chance 8e-7"


def test_classes_without_samples_take_no_part() -> None:
    np.testing.assert_array_equal(expected_copies([6, 0, 2], 0.0), [4 / 6, 0, 2])
    assert expected_copies([6, 0, 2], 1.0).tolist() == [1, 0, 1]


def test_copy_k_takes_the_view_that_copy_0_takes_k_epochs_later() -> None:
    copy = np.arange(6)
    for cycle in (None, 1, 4):
        later = [int(view_of_copy(np.array([0]), epoch=5 + k, cycle=cycle)[0]) for k in range(6)]
        assert view_of_copy(copy, epoch=5, cycle=cycle).tolist() == later
    assert view_of_copy(copy, epoch=5, cycle=None).tolist() == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"power": 1.5}, ConfigError, r"power must be in \[0, 1\], got 1.5"),
        ({"class_counts": [0, 0]}, DataError, "one above 0"),
        ({"class_counts": [3, -1]}, DataError, ">= 0"),
        (
            {"labels": np.array([0, 2, 1])},
            DataError,
            "labels reach from 0 to 2, the class counts are of 2 classes",
        ),
        ({"labels": np.array([0, 1])}, ShapeError, r"must be \[N\] both"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {
        "sample_ids": np.arange(3), "labels": np.array([0, 0, 1]), "class_counts": [2, 1],
        "power": 0.5, "seed": 0, "epoch": 0,
    }  # fmt: skip
    copies_in_epoch(**right)
    with pytest.raises(error, match=message):
        copies_in_epoch(**(right | change))


def test_registry_has_the_samplers_of_the_config_with_their_sources() -> None:
    assert set(SAMPLERS) == set(get_args(SamplerConfig.model_fields["name"].annotation))
    assert SAMPLERS[SamplerConfig().name].power == 1
    assert all("arXiv:" in record.source for record in SAMPLERS.values())
