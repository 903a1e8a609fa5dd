"""Answers which images of a source make its long-tailed train split and its validation split.

Works on labels alone: it reads no image, writes no file and never touches global random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from krd_ray.errors import ConfigError, DataError, ShapeError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
ClassOrder = Literal["index", "count"]
ValPolicy = Literal["left_out", "hold_out", "auto"]

MANY_ABOVE = 100
FEW_BELOW = 20
# Streams drawn from one user seed; the long-tail draw itself uses the bare seed, as LDAM-DRW does.
_VALIDATION_STREAM = 1
_BALANCED_STREAM = 2


@dataclass(frozen=True)
class ValidationSplit:
    """What `select_validation` decided: two disjoint masks and what each class is short of.

    Fields: train [N] bool (what stays for training), val [N] bool, num_missing [C] int64 (asked minus given).
    """

    train: BoolArray
    val: BoolArray
    num_missing: IntArray


def exponential_counts(num_classes: int, n_max: int, imbalance_ratio: float) -> IntArray:
    """Number of training images per class, falling exponentially from head to tail.

        n_c = int(n_max * (1 / ratio) ** (c / (C - 1))),   c = 0 .. C - 1

    Args:
        num_classes: C >= 1; one class simply keeps n_max.
        n_max: images of the head class, >= 1.
        imbalance_ratio: head count over tail count, >= 1.
    Returns:
        [C] int64, non-increasing, every entry >= 1.
    Raises:
        ConfigError: an argument is out of range.
        DataError: the ratio leaves a class without an image.
    Source: Cao et al. 2019 (arXiv:1906.07413), the `exp` profile of the LDAM-DRW code, same expression and
        truncation. Deviation: an empty class is refused.
    Example:
        >>> exponential_counts(3, 100, 100).tolist()
        [100, 10, 1]
    """
    if num_classes < 1 or n_max < 1:
        raise ConfigError(f"num_classes and n_max must be >= 1, got {num_classes} and {n_max}")
    if not 1 <= imbalance_ratio < float("inf"):
        raise ConfigError(f"imbalance_ratio must be a finite number >= 1, got {imbalance_ratio}")
    factor = 1.0 / imbalance_ratio
    span = max(num_classes - 1.0, 1.0)
    counts = np.array([int(n_max * factor ** (c / span)) for c in range(num_classes)], dtype=np.int64)
    if counts[-1] < 1:
        raise DataError(
            f"class {int(np.argmin(counts > 0))} would keep no image: n_max {n_max} with imbalance_ratio "
            f"{imbalance_ratio:g} falls below 1; use an imbalance_ratio below {n_max}"
        )
    return counts


def profile_counts(
    available: IntArray, *, n_max: int | None, imbalance_ratio: float | None, class_order: ClassOrder
) -> IntArray:
    """Number of images each class is asked to keep, before looking whether it has them.

    Args:
        available: [C] int, images per class in the source.
        n_max: images of the head class; None means all that the head class has.
        imbalance_ratio: >= 1, or None to keep the source's own distribution.
        class_order: `index` makes class 0 the head, `count` the class with most images (ties: lower index).
    Returns:
        [C] int64, in class index order; entries may exceed `available`.
    Raises:
        ConfigError: unknown class_order, or n_max without imbalance_ratio.
        DataError: a class would keep no image.
    Example:
        >>> have = np.array([20, 100, 50])
        >>> profile_counts(have, n_max=None, imbalance_ratio=100, class_order="count").tolist()
        [1, 100, 10]
    """
    available = np.asarray(available, dtype=np.int64)
    if class_order not in ("index", "count"):
        raise ConfigError(f"class_order must be 'index' or 'count', got {class_order!r}")
    if imbalance_ratio is None:
        if n_max is not None:
            raise ConfigError(
                f"n_max is {n_max} but imbalance_ratio is not set: set both, or neither to keep the "
                "source's own"
            )
        return available.copy()
    num_classes = len(available)
    order = np.arange(num_classes)
    if class_order == "count":
        order = np.argsort(-available, kind="stable")
    head = int(available[order[0]]) if n_max is None else n_max
    counts = np.empty(num_classes, dtype=np.int64)
    counts[order] = exponential_counts(num_classes, head, imbalance_ratio)
    return counts


def select_long_tail(
    labels: IntArray, counts: IntArray, seed: int, ranks: IntArray | None = None
) -> BoolArray:
    """Mask of the images that a long-tailed train split keeps.

    Without ranks, each class (in index order, one generator for all) is shuffled and its first n_c images
    kept; with ranks, the images with rank < n_c are. A class with fewer than n_c images keeps all of them.

    Args:
        labels: [N] int, 0 <= label < C.
        counts: [C] int, n_c.
        seed: 0 <= seed < 2**32; unused with ranks.
        ranks: [N] int, the image's place inside its class, unique there; or None.
    Returns:
        [N] bool.
    Raises:
        DataError: a label is out of range, a class is empty, or ranks repeat inside a class.
    Source: LDAM-DRW's generator; the draw equals `np.random.seed(seed)`, then `np.random.shuffle` per class.
        Deviation: global random state stays untouched.
    Example:
        >>> labels, ranks = np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])
        >>> select_long_tail(labels, np.array([2, 1]), 0, ranks).tolist()
        [True, False, True, True]
    """
    labels, counts = np.asarray(labels, dtype=np.int64), np.asarray(counts, dtype=np.int64)
    check_classes(labels, len(counts))
    if ranks is not None:
        ranks = np.asarray(ranks, dtype=np.int64)
        _check_ranks(labels, ranks)
        return np.asarray(ranks < counts[labels])
    mask = np.zeros(len(labels), dtype=np.bool_)
    rng = np.random.RandomState(seed)
    for c, index in _class_indices(labels, len(counts)):
        rng.shuffle(index)
        mask[index[: counts[c]]] = True
    return mask


def select_validation(
    labels: IntArray, train_mask: BoolArray, per_class: int, seed: int, policy: ValPolicy
) -> ValidationSplit:
    """Balanced validation split for model selection, disjoint from the train split.

    `left_out` takes only images that long-tailing left out. `hold_out` takes from train, never more than
    half of a class. `auto` uses what was left out and holds out of train only what is then missing.

    Args:
        labels: [N] int, every class 0 .. max(labels) present.
        train_mask: [N] bool, the long-tailed train split.
        per_class: images wanted per class, >= 0.
        seed: 0 <= seed < 2**32.
        policy: where the images come from.
    Returns:
        ValidationSplit; a class that cannot give `per_class` gives what it has, see `num_missing`.
    Raises:
        ConfigError: unknown policy or negative per_class.
        ShapeError: labels and train_mask differ in length.
    Example:
        >>> labels, train = np.zeros(6, dtype=np.int64), np.array([True, True, True, True, False, False])
        >>> split = select_validation(labels, train, 3, 0, "auto")
        >>> int(split.val.sum()), int(split.train.sum()), split.num_missing.tolist()
        (3, 3, [0])
    """
    if policy not in ("left_out", "hold_out", "auto"):
        raise ConfigError(f"val_policy must be 'left_out', 'hold_out' or 'auto', got {policy!r}")
    if per_class < 0:
        raise ConfigError(f"val_per_class must be >= 0, got {per_class}")
    labels, train = np.asarray(labels, dtype=np.int64), np.array(train_mask, dtype=np.bool_)
    if labels.shape != train.shape:
        raise ShapeError(f"labels {labels.shape} and train_mask {train.shape} must have one entry per image")
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    val = np.zeros_like(train)
    missing = np.zeros(num_classes, dtype=np.int64)
    rng = np.random.RandomState([seed, _VALIDATION_STREAM])
    for c, index in _class_indices(labels, num_classes):
        rng.shuffle(index)
        kept, left_out = index[train[index]], index[~train[index]]
        from_left_out = left_out[:per_class] if policy != "hold_out" else left_out[:0]
        wanted = per_class - len(from_left_out) if policy != "left_out" else 0
        from_train = kept[: min(wanted, len(kept) // 2)]
        val[from_left_out] = True
        val[from_train] = True
        train[from_train] = False
        missing[c] = per_class - len(from_left_out) - len(from_train)
    return ValidationSplit(train=train, val=val, num_missing=missing)


def select_balanced(labels: IntArray, num_classes: int, per_class: int, seed: int) -> BoolArray:
    """Mask of a test split that holds exactly `per_class` images of every class.

    Args:
        labels: [N] int, 0 <= label < C.
        num_classes: C.
        per_class: images per class, >= 1.
        seed: 0 <= seed < 2**32.
    Returns:
        [N] bool with C * per_class entries set.
    Raises:
        DataError: a class has no more than `per_class` images, so that none would be left to train on.
    Example:
        >>> int(select_balanced(np.array([0, 0, 1, 1, 1]), 2, 1, 0).sum())
        2
    """
    labels = np.asarray(labels, dtype=np.int64)
    check_classes(labels, num_classes)
    mask = np.zeros(len(labels), dtype=np.bool_)
    rng = np.random.RandomState([seed, _BALANCED_STREAM])
    for c, index in _class_indices(labels, num_classes):
        if len(index) <= per_class:
            raise DataError(
                f"class {c} has {len(index)} images, too few to hold out test_per_class {per_class} of them "
                "and "
                "still train: lower test_per_class or give the source a test set of its own"
            )
        rng.shuffle(index)
        mask[index[:per_class]] = True
    return mask


def compact_ranks(labels: IntArray, ranks: IntArray) -> IntArray:
    """Ranks renumbered 0, 1, 2, ... inside each class, order kept: closes gaps after images were taken away.

    Args:
        labels: [N] int.
        ranks: [N] int, unique inside each class.
    Returns:
        [N] int64.
    Raises:
        DataError: ranks repeat inside a class or are negative.
    Example:
        >>> compact_ranks(np.array([0, 0, 1]), np.array([7, 3, 5])).tolist()
        [1, 0, 0]
    """
    labels, ranks = np.asarray(labels, dtype=np.int64), np.asarray(ranks, dtype=np.int64)
    _check_ranks(labels, ranks)
    order = np.lexsort((ranks, labels))
    starts = np.searchsorted(labels[order], labels[order], side="left")
    compact = np.empty_like(ranks)
    compact[order] = np.arange(len(ranks)) - starts
    return compact


def shot_groups(class_counts: IntArray) -> dict[str, BoolArray]:
    """Which classes are many-shot (> 100 training images), medium-shot (20 to 100) and few-shot (< 20).

    Args:
        class_counts: [C] int, training images per class.
    Returns:
        `many`, `medium`, `few`, each [C] bool; every class is in exactly one.
    Source: Liu et al. 2019 (arXiv:1904.05160), section 4. Deviation: none.
    Example:
        >>> {name: mask.tolist() for name, mask in shot_groups(np.array([101, 100, 19])).items()}
        {'many': [True, False, False], 'medium': [False, True, False], 'few': [False, False, True]}
    """
    counts = np.asarray(class_counts)
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {"many": many, "medium": ~(many | few), "few": few}


def check_classes(labels: IntArray, num_classes: int) -> None:
    """Refuse labels outside 0 .. C - 1 and classes without an image.

    Args:
        labels: [N] int.
        num_classes: C.
    Raises:
        DataError: names the row and its label, or the first empty class.
    Example:
        >>> check_classes(np.array([0, 1, 1]), 2)
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"row {row} has label {int(labels[row])}, outside 0..{num_classes - 1} ({len(outside)} such "
            "rows): "
            "correct the labels or the list of classes"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=num_classes) == 0)
    if len(empty):
        raise DataError(
            f"class {int(empty[0])} has no image ({len(empty)} of {num_classes} classes are empty): "
            "add images or remove the class"
        )


def _class_indices(labels: IntArray, num_classes: int) -> Iterator[tuple[int, IntArray]]:
    """Each class with the ascending row numbers of its images, in one sort rather than C scans."""
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(num_classes + 1))
    for c in range(num_classes):
        yield c, order[bounds[c] : bounds[c + 1]].astype(np.int64)


def _check_ranks(labels: IntArray, ranks: IntArray) -> None:
    if labels.shape != ranks.shape:
        raise ShapeError(f"labels {labels.shape} and ranks {ranks.shape} must have one entry per image")
    if len(ranks) and ranks.min() < 0:
        row = int(np.argmin(ranks))
        raise DataError(f"row {row} has rank {int(ranks[row])}: ranks inside a class start at 0")
    order = np.lexsort((ranks, labels))
    same = (np.diff(labels[order]) == 0) & (np.diff(ranks[order]) == 0)
    if same.any():
        row = int(order[int(np.argmax(same)) + 1])
        raise DataError(
            f"row {row}: rank {int(ranks[row])} appears twice in class {int(labels[row])}; "
            "ranks must be unique inside a class"
        )
