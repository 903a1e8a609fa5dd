"""Answers which source row goes to which split, and where in it: the whole plan, from labels alone.

Reads no image and writes no file; the result depends on the labels and the settings only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from krd_ray.data.manifest import LongTailSpec, Split
from krd_ray.errors import DataError
from krd_ray.maths.longtail import (
    BoolArray,
    IntArray,
    check_classes,
    compact_ranks,
    profile_counts,
    select_balanced,
    select_long_tail,
    select_validation,
)

if TYPE_CHECKING:
    from krd_ray.data.shards import ShardOptions

TEST_SEED = 0  # held-out test images stay the same whatever seed long-tails the rest
NUM_CLASSES_SHOWN = 5
_ORDER_STREAM = {"train": 3, "val": 4, "test": 5}


@dataclass(frozen=True)
class SplitPlan:
    """Three disjoint masks [N] over the train enumeration, the profile they follow, and what fell short.

    `test` is all False when the source has a test set of its own.
    """

    train: BoolArray
    val: BoolArray
    test: BoolArray
    long_tail: LongTailSpec
    warnings: list[str]


def plan_splits(
    classes: Sequence[str], labels: IntArray, ranks: IntArray | None, *, has_test: bool, options: ShardOptions
) -> SplitPlan:
    """Decide the split of every row of the train enumeration.

    Order: the test split is held out first (where the source has none), then the rest is long-tailed, then
    the validation split is taken by `options.val_policy`.

    Args:
        classes: C names.
        labels: [N] int64 train labels.
        ranks: [N] int64 places inside the class, or None.
        has_test: the source has a test set of its own.
        options: settings.
    Returns:
        The plan.
    Raises:
        DataError: an empty class, or too few images for the test split.
    """
    num_classes = len(classes)
    refuse_empty(classes, labels, "in the source")
    check_classes(labels, num_classes)
    test = np.zeros(len(labels), dtype=np.bool_)
    if not has_test:
        test = select_balanced(labels, num_classes, options.test_per_class, TEST_SEED)
    pool = np.flatnonzero(~test)
    available = np.bincount(labels[pool], minlength=num_classes)
    counts = profile_counts(
        available,
        n_max=options.n_max,
        imbalance_ratio=options.imbalance_ratio,
        class_order=options.class_order,
    )
    pool_ranks = None if ranks is None else ranks[pool]
    if pool_ranks is not None and not has_test:
        pool_ranks = compact_ranks(labels[pool], pool_ranks)  # the held-out images left gaps
    in_train = select_long_tail(labels[pool], counts, options.seed, pool_ranks)
    kept = np.bincount(labels[pool[in_train]], minlength=num_classes)
    chosen = select_validation(
        labels[pool], in_train, options.val_per_class, options.seed, options.val_policy
    )
    train, val = np.zeros_like(test), np.zeros_like(test)
    train[pool], val[pool] = chosen.train, chosen.val
    refuse_empty(classes, labels[train], "after long-tailing")
    return SplitPlan(
        train=train,
        val=val,
        test=test,
        long_tail=_spec(counts, options),
        warnings=_clipped(classes, kept, counts)
        + _short_validation(classes, chosen.num_missing, options.val_per_class),
    )


def shuffled_positions(num_rows: int, split: Split, seed: int) -> IntArray:
    """A uniformly random order of one split's rows.

    Args:
        num_rows: n.
        split: its name; each split has a stream of its own.
        seed: 0 <= seed < 2**32.
    Returns:
        [n] int64 permutation: entry i is the place of the i-th row.
    Example:
        >>> sorted(shuffled_positions(4, "train", 0).tolist())
        [0, 1, 2, 3]
    """
    rng = np.random.RandomState([seed, _ORDER_STREAM[split]])
    return np.asarray(rng.permutation(num_rows), dtype=np.int64)


def refuse_empty(classes: Sequence[str], labels: IntArray, where: str) -> None:
    """Refuse a class without a training image, by name.

    Args:
        classes: C names.
        labels: [N] int; labels out of range are not this check's concern.
        where: at which step, for the error.
    Raises:
        DataError: names the first empty class.
    Example:
        >>> refuse_empty(["cat"], np.array([0, 0]), "in the source")
    """
    present = np.zeros(len(classes), dtype=np.bool_)
    present[labels[(labels >= 0) & (labels < len(classes))]] = True
    if not present.all():
        c = int(np.argmin(present))
        raise DataError(
            f"class {c} ({classes[c]!r}) has no training image {where} ({int((~present).sum())} of "
            f"{len(classes)} "
            "classes are empty): add images, or remove the class and renumber the labels"
        )


def name_classes(classes: Sequence[str], notes: dict[int, str]) -> str:
    """The first few classes of a warning, with a note each.

    Args:
        classes: C names.
        notes: class index to note.
    Returns:
        Text such as "0 'cat' (12 of 20), 3 'dog' (1 of 20) and 7 more".
    Example:
        >>> name_classes(["cat", "dog"], {1: "2 of 5"})
        "1 'dog' (2 of 5)"
    """
    shown = [f"{c} {classes[c]!r} ({note})" for c, note in list(notes.items())[:NUM_CLASSES_SHOWN]]
    more = len(notes) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _spec(counts: IntArray, options: ShardOptions) -> LongTailSpec:
    is_source = options.imbalance_ratio is None
    return LongTailSpec(
        profile="source" if is_source else "exponential",
        imbalance_ratio=None if options.imbalance_ratio is None else float(options.imbalance_ratio),
        n_max=None if is_source else int(counts.max()),
        seed=options.seed,
        class_order=options.class_order,
        val_policy=options.val_policy,
        val_per_class=options.val_per_class,
    )


def _clipped(classes: Sequence[str], kept: IntArray, counts: IntArray) -> list[str]:
    notes = {int(c): f"{kept[c]} of {counts[c]}" for c in np.flatnonzero(counts > kept)}
    return _warning("fewer images than the long-tail profile asks for, all of them kept", classes, notes)


def _short_validation(classes: Sequence[str], missing: IntArray, per_class: int) -> list[str]:
    notes = {int(c): f"{per_class - missing[c]} of {per_class}" for c in np.flatnonzero(missing)}
    return _warning("fewer validation images than val_per_class", classes, notes)


def _warning(what: str, classes: Sequence[str], notes: dict[int, str]) -> list[str]:
    if not notes:
        return []
    return [f"{what}, in {len(notes)} of {len(classes)} classes: {name_classes(classes, notes)}"]
