"""Answers what the data path is measured on: smooth patches with noise; PNG and JPEG cost about what photographs do.

Does not measure.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import ShardSet
from krd_ray.data.shards import write_shards
from krd_ray.data.source_arrays import ArraySource
from krd_ray.data.source_contract import RawSample
from krd_ray.maths.longtail import BoolArray

SIDE, NUM_CLASSES = 32, 10


def synthetic_images(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [N, SIDE, SIDE, 3]."""
    patches = generator.integers(16, 240, (len(labels), SIDE // 4, SIDE // 4, 3))
    images = patches.repeat(4, axis=1).repeat(4, axis=2)
    return (images + generator.integers(-12, 13, images.shape)).astype(np.uint8)


def imbalanced_labels(num_rows: int) -> np.ndarray:
    """int64 [N]: class c has about 100^(-c / (C - 1)) of the head's rows."""
    weights = 100.0 ** (-np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    counts = np.maximum(1, (weights / weights.sum() * num_rows).astype(np.int64))
    counts[0] += num_rows - counts.sum()
    return np.repeat(np.arange(NUM_CLASSES), counts)


@dataclass(frozen=True)
class JpegSource:
    """An array source whose images are JPEG files."""

    arrays: ArraySource

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arrays, name)

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        return map(_as_jpeg, self.arrays.iter_train(selected))

    def iter_test(self) -> Iterator[RawSample]:
        return map(_as_jpeg, self.arrays.iter_test())


def _as_jpeg(sample: RawSample) -> RawSample:
    assert isinstance(sample.image, np.ndarray)
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, format="JPEG", quality=90)
    return replace(sample, image=buffer.getvalue())


def write_splits(folder: Path, num_rows: int) -> dict[str, ShardSet]:
    """The same images three times: raw pixels, PNG, JPEG."""
    generator = np.random.default_rng(0)
    labels, test = imbalanced_labels(num_rows), np.arange(NUM_CLASSES)
    source = ArraySource(
        name="synthetic",
        classes=[str(c) for c in range(NUM_CLASSES)],
        train_NHWC=synthetic_images(labels, generator),
        train=labels,
        test_NHWC=synthetic_images(test, generator),
        test=test,
    )
    splits = {}
    for store, kind in (("raw", source), ("png", source), ("jpeg", JpegSource(source))):
        options = ShardOptions(store="raw" if store == "raw" else "encoded", image_size=SIDE, val_per_class=0)
        manifest = write_shards(kind, folder / store, options)
        splits[store] = ShardSet.open(folder / store, manifest, "train")
    return splits
