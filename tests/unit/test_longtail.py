"""Long-tailing against published numbers, the original generator's draw, and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.errors import ConfigError, DataError
from krd_ray.maths.longtail import (
    compact_ranks,
    exponential_counts,
    profile_counts,
    select_balanced,
    select_long_tail,
    select_validation,
    shot_groups,
)

FEW_EXAMPLES = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize(
    ("num_classes", "n_max", "ratio", "total"),
    [(100, 500, 100, 10847), (100, 500, 50, 12608), (100, 500, 10, 19573), (10, 5000, 100, 12406)],
)
def test_counts_add_up_to_the_published_cifar_lt_sizes(num_classes, n_max, ratio, total):
    counts = exponential_counts(num_classes, n_max, ratio)
    assert counts.sum() == total
    assert counts[0] == n_max
    assert counts[-1] == n_max // ratio


@pytest.mark.parametrize(("ratio", "sizes"), [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))])
def test_shot_groups_of_cifar100_lt(ratio, sizes):
    groups = shot_groups(exponential_counts(100, 500, ratio))
    assert tuple(int(groups[name].sum()) for name in ("many", "medium", "few")) == sizes


def test_shot_group_borders_belong_to_medium():
    groups = shot_groups(np.array([101, 100, 20, 19]))
    assert groups["many"].tolist() == [True, False, False, False]
    assert groups["medium"].tolist() == [False, True, True, False]
    assert groups["few"].tolist() == [False, False, False, True]


@FEW_EXAMPLES
@given(st.integers(1, 300), st.integers(1, 2000), st.floats(1, 500))
def test_counts_fall_and_their_ends_are_the_ratio(num_classes, n_max, ratio):
    ratio = max(1.0, min(ratio, 0.99 * n_max))
    counts = exponential_counts(num_classes, n_max, ratio)
    assert counts[0] == n_max
    assert (np.diff(counts) <= 0).all()
    if num_classes > 1:
        assert abs(counts[-1] - n_max / ratio) <= 1


def test_ratio_that_empties_the_tail_names_the_class_and_the_limit():
    with pytest.raises(DataError, match=r"class 7 would keep no image.*imbalance_ratio below 10"):
        exponential_counts(10, 10, 30)
    with pytest.raises(DataError, match=r"class 1 would keep no image"):
        exponential_counts(2, 49, 49)  # 49 * (1 / 49) truncates to 0, as it does in the original


@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf")])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ConfigError, match="imbalance_ratio"):
        exponential_counts(3, 10, ratio)


def test_draw_is_that_of_the_global_generator_and_leaves_it_alone():
    labels = np.random.RandomState(5).randint(0, 7, size=400)
    counts = exponential_counts(7, 40, 8)
    np.random.seed(3)
    expected = []
    for c, n in zip(np.unique(labels), counts, strict=True):
        index = np.where(labels == c)[0]
        np.random.shuffle(index)
        expected += index[:n].tolist()
    state = np.random.get_state()[1].copy()
    mask = select_long_tail(labels, counts, seed=3)
    assert np.flatnonzero(mask).tolist() == sorted(expected)
    assert (np.random.get_state()[1] == state).all()


def test_ranks_give_nested_subsets():
    labels = np.repeat(np.arange(5), 60)
    ranks = np.tile(np.random.RandomState(0).permutation(60), 5)
    steep = select_long_tail(labels, exponential_counts(5, 60, 20), 0, ranks)
    flat = select_long_tail(labels, exponential_counts(5, 60, 4), 0, ranks)
    assert (flat | ~steep).all()
    assert np.bincount(labels[steep]).tolist() == exponential_counts(5, 60, 20).tolist()
    assert ranks[steep & (labels == 4)].max() == 2


def test_repeated_rank_is_refused_by_row():
    with pytest.raises(DataError, match=r"row 2: rank 1 appears twice in class 0"):
        select_long_tail(np.array([0, 0, 0]), np.array([2]), 0, np.array([0, 1, 1]))


def test_empty_class_and_foreign_label_are_named():
    with pytest.raises(DataError, match=r"class 1 has no image \(2 of 4"):
        select_long_tail(np.array([0, 2]), np.array([1, 1, 1, 1]), 0)
    with pytest.raises(DataError, match=r"row 1 has label 9, outside 0\.\.3"):
        select_long_tail(np.array([0, 9]), np.array([1, 1, 1, 1]), 0)


def test_class_order_count_makes_the_largest_class_the_head():
    available = np.array([50, 400, 100, 400])
    by_count = profile_counts(available, n_max=None, imbalance_ratio=8, class_order="count")
    assert by_count.tolist() == [50, 400, 100, 200]
    by_index = profile_counts(available, n_max=None, imbalance_ratio=8, class_order="index")
    assert by_index.tolist() == exponential_counts(4, 50, 8).tolist()


def test_source_profile_keeps_the_counts_and_refuses_n_max():
    available = np.array([3, 9, 4])
    kept = profile_counts(available, n_max=None, imbalance_ratio=None, class_order="index")
    assert kept.tolist() == [3, 9, 4]
    with pytest.raises(ConfigError, match="n_max is 5 but imbalance_ratio is not set"):
        profile_counts(available, n_max=5, imbalance_ratio=None, class_order="index")


@FEW_EXAMPLES
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(0, 12),
    st.floats(0, 1),
    st.sampled_from(["left_out", "hold_out", "auto"]),
    st.integers(0, 2**32 - 1),
)
def test_validation_is_disjoint_bounded_and_accounted_for(sizes, per_class, kept_frac, policy, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    before = np.random.RandomState(1).random_sample(len(labels)) < kept_frac
    split = select_validation(labels, before, per_class, seed, policy)
    again = select_validation(labels, before, per_class, seed, policy)
    assert (split.val == again.val).all()
    assert (split.train == again.train).all()
    assert not (split.train & split.val).any()
    assert (before | ~split.train).all(), "validation never adds training images"
    given_per_class = np.bincount(labels[split.val], minlength=len(sizes))
    assert (given_per_class + split.num_missing == per_class).all()
    assert (split.num_missing >= 0).all()
    for c in range(len(sizes)):
        had, has = (before & (labels == c)).sum(), (split.train & (labels == c)).sum()
        left_out = (~before & (labels == c)).sum()
        if policy == "left_out":
            assert has == had
            assert given_per_class[c] == min(per_class, left_out)
        elif policy == "hold_out":
            assert had - has == given_per_class[c] == min(per_class, had // 2)
        else:
            assert had - has == min(max(per_class - left_out, 0), had // 2)


def test_hold_out_never_takes_a_tail_class_away():
    labels = np.array([0, 1, 1, 2, 2, 2])
    split = select_validation(labels, np.ones(6, dtype=bool), 5, 0, "hold_out")
    assert np.bincount(labels[split.train]).tolist() == [1, 1, 2]
    assert split.num_missing.tolist() == [5, 4, 4]


def test_balanced_split_is_balanced_and_refuses_to_empty_a_class():
    labels = np.repeat(np.arange(3), [10, 7, 5])
    mask = select_balanced(labels, 3, 4, 0)
    assert np.bincount(labels[mask]).tolist() == [4, 4, 4]
    with pytest.raises(DataError, match=r"class 2 has 5 images.*test_per_class 5"):
        select_balanced(labels, 3, 5, 0)


def test_compact_ranks_close_gaps_and_keep_order():
    labels, ranks = np.array([1, 0, 1, 1, 0]), np.array([9, 4, 2, 5, 1])
    assert compact_ranks(labels, ranks).tolist() == [2, 1, 0, 1, 0]
