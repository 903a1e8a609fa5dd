"""Answers how image sets that fit into memory as one array (scikit-learn's digits, CIFAR) become a source.

Does not resize or long-tail them, and downloads nothing unless asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from krd_ray.data.source_contract import RawSample
from krd_ray.errors import DataError
from krd_ray.maths.longtail import BoolArray, IntArray

DIGITS_MAX_VALUE = 16


@dataclass(frozen=True)
class ArraySource:
    """A source whose pixels are in memory; arrays are [N, H, W, 3] uint8, labels [N] int64."""

    name: str
    classes: list[str]
    train_NHWC: NDArray[np.uint8] = field(repr=False)
    train: IntArray = field(repr=False)
    test_NHWC: NDArray[np.uint8] = field(repr=False)
    test: IntArray = field(repr=False)

    def describe(self) -> dict[str, str | int]:
        return {"kind": self.name}

    def train_labels(self) -> IntArray:
        return self.train

    def train_ranks(self) -> IntArray | None:
        return None

    def test_labels(self) -> IntArray:
        return self.test

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        for index in np.flatnonzero(selected).tolist():
            yield RawSample(
                index, int(self.train[index]), self.train_NHWC[index], f"{self.name} train image {index}"
            )

    def iter_test(self) -> Iterator[RawSample]:
        for index, label in enumerate(self.test.tolist()):
            yield RawSample(index, label, self.test_NHWC[index], f"{self.name} test image {index}")


def open_digits() -> ArraySource:
    """scikit-learn's bundled handwritten digits: 1797 real 8x8 images, 10 classes, no download, no test set.

    Returns:
        Source of grey images repeated to RGB, values 0..16 scaled to 0..255.
    Example:
        >>> len(open_digits().train_labels())
        1797
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey_NHW = np.rint(digits.images * (255 / DIGITS_MAX_VALUE)).astype(np.uint8)
    images_NHWC = np.repeat(grey_NHW[..., None], 3, axis=3)
    return ArraySource(
        name="digits",
        classes=[str(name) for name in digits.target_names],
        train_NHWC=images_NHWC,
        train=np.asarray(digits.target, dtype=np.int64),
        test_NHWC=images_NHWC[:0],
        test=np.empty(0, dtype=np.int64),
    )


def open_cifar(kind: Literal["cifar10", "cifar100"], root: Path, *, download: bool) -> ArraySource:
    """CIFAR-10 or CIFAR-100 in torchvision's folder format, with its own balanced test set.

    Args:
        kind: which of the two.
        root: folder that holds `cifar-10-batches-py` or `cifar-100-python`, or receives the download.
        download: fetch the set when it is not there.
    Returns:
        Source of 50,000 train and 10,000 test images, 32x32.
    Raises:
        DataError: the files are missing, incomplete or cannot be downloaded.
    """
    from krd_ray.models.torchvision_import import import_torchvision

    datasets = import_torchvision().datasets
    fn = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    try:
        train, test = (fn(root=str(root), train=is_train, download=download) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        advice = "look at the network" if download else "correct the folder, or allow the download"
        raise DataError(f"{kind} cannot be read from {root}: {error}; {advice}") from error
    return ArraySource(
        name=kind,
        classes=list(train.classes),
        train_NHWC=train.data,
        train=np.asarray(train.targets, dtype=np.int64),
        test_NHWC=test.data,
        test=np.asarray(test.targets, dtype=np.int64),
    )
