"""Answers what every image source can say: its classes, its labels, and its images one by one.

Reads nothing itself: each kind of source lives in its own `source_*.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from krd_ray.errors import DataError
from krd_ray.maths.longtail import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image as its source holds it.

    Fields: index (place in the train or test enumeration), label, image (encoded bytes untouched, [H, W, 3]
    uint8 pixels, or None where it could not be read), where (names it in errors, and says why it is None).
    """

    index: int
    label: int
    image: bytes | NDArray[np.uint8] | None
    where: str


class Source(Protocol):
    """A labelled image set that can be listed cheaply and streamed in order.

    A source without a test set of its own returns no test labels; the shard writer then holds a balanced test
    split out of the train enumeration.
    """

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into them."""

    def describe(self) -> Mapping[str, str | int]:
        """Kind and base names for the manifest; no folder of this machine."""

    def train_labels(self) -> IntArray:
        """[N] int64, without reading any image."""

    def train_ranks(self) -> IntArray | None:
        """[N] int64, the image's place inside its class, for nested subsets; None if the source has none."""

    def test_labels(self) -> IntArray:
        """[M] int64; empty when the source has no test set."""

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        """The train images where `selected` [N] is set, in index order, a bounded number in memory."""

    def iter_test(self) -> Iterator[RawSample]:
        """All test images in index order, a bounded number in memory."""


def check_labels(labels: IntArray, classes: Sequence[str], where: str) -> None:
    """Refuse labels that are no index into the class names.

    Args:
        labels: [N] int.
        classes: C names.
        where: names the file or list in the error.
    Raises:
        DataError: names the first such row.
    Example:
        >>> check_labels(np.array([0, 1]), ["cat", "dog"], "a list")
    """
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{where}, row {row}: label {int(labels[row])} is outside 0..{len(classes) - 1} "
            f"({len(outside)} such rows); correct the labels or the class names"
        )
