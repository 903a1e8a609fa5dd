"""Answers what is in each image, and sends it on: decode once, check, measure, buffer for its shard.

Decides no split (`shard_splits`) and writes no Parquet (`shard_spill`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from krd_ray.data.images import Pixels, decode_image, encode_png, fit_array
from krd_ray.data.manifest import SPLITS, ImageSpec, Split
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_spill import Spill, SpillRow
from krd_ray.data.shard_splits import SplitPlan, shuffled_positions
from krd_ray.data.source_contract import RawSample, Source
from krd_ray.errors import DataError
from krd_ray.maths.longtail import IntArray

log = logging.getLogger(__name__)

CHUNK_SAMPLES = 64  # images in flight between the source and the buffers
MAX_THREADS = 8


@dataclass(frozen=True)
class Router:
    """Where each selected row goes: split, then a uniformly random place in that split.

    Fields: split_of [N] int8 (index into SPLITS, -1 unused), position_of [N] int64 inside the split; N covers
    the train enumeration and then the source's own test set. num_rows and num_shards are per split.
    """

    split_of: NDArray[np.int8]
    position_of: IntArray
    num_rows: dict[Split, int]
    num_shards: dict[Split, int]

    @classmethod
    def of(cls, plan: SplitPlan, num_own_test: int, options: ShardOptions) -> Router:
        """Draw the order of every split."""
        own_test = np.ones(num_own_test, dtype=np.bool_)
        unused = np.zeros_like(own_test)
        split_of = np.full(len(plan.train) + len(own_test), -1, dtype=np.int8)
        position_of = np.full(len(split_of), -1, dtype=np.int64)
        num_rows: dict[Split, int] = {}
        masks = (
            np.concatenate([plan.train, unused]),
            np.concatenate([plan.val, unused]),
            np.concatenate([plan.test, own_test]),
        )
        for code, (split, mask) in enumerate(zip(SPLITS, masks, strict=True)):
            num_rows[split] = int(mask.sum())
            split_of[mask] = code
            position_of[mask] = shuffled_positions(num_rows[split], split, options.seed)
        num_shards = {split: math.ceil(n / options.rows_per_shard) for split, n in num_rows.items()}
        return cls(split_of, position_of, num_rows, num_shards)

    def shard(self, sample_id: int) -> tuple[Split, int]:
        """Split and shard number of a row; shards of a split differ by at most one row."""
        split = SPLITS[int(self.split_of[sample_id])]
        return split, int(self.position_of[sample_id]) * self.num_shards[split] // self.num_rows[split]


@dataclass
class _Prepared:
    """One decoded sample: payload None when it is bad, sums [2, 3] int64 of x and x^2 per channel."""

    sample: RawSample
    payload: bytes | None
    size: tuple[int, int]
    sums: IntArray
    problem: str


@dataclass
class FirstPass:
    """Phase one: every selected image is decoded once and measured, its bytes go to its shard's buffer."""

    classes: list[str]
    options: ShardOptions
    train_labels: IntArray
    test_labels: IntArray
    num_skipped: int = 0
    first_problem: str = ""
    counts: dict[Split, IntArray] = field(default_factory=dict)
    _size: tuple[int, int] | None = None
    _sums: list[list[int]] = field(default_factory=lambda: [[0, 0, 0], [0, 0, 0]])
    _num_pixels: int = 0

    def run(self, source: Source, router: Router, spill: Spill) -> None:
        """Stream the source once, in its own order; decoding runs on threads, everything else here."""
        self.counts = {split: np.zeros(len(self.classes), dtype=np.int64) for split in SPLITS}
        num_train = len(self.train_labels)
        expected = np.concatenate([self.train_labels, self.test_labels])
        train = source.iter_train(router.split_of[:num_train] >= 0)
        rows = chain(
            ((sample.index, sample) for sample in train),
            ((num_train + sample.index, sample) for sample in source.iter_test()),
        )
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
            for chunk in _chunks(rows, CHUNK_SAMPLES):
                for sample_id, done in pool.map(lambda row: (row[0], self._prepare(row[1])), chunk):
                    if int(expected[sample_id]) != done.sample.label:
                        raise DataError(f"{done.sample.where}: its label changed while the source was read")
                    self._accept(sample_id, done, router, spill)
        spill.flush()

    def _prepare(self, sample: RawSample) -> _Prepared:
        """Runs on the pool's threads: touches nothing shared."""
        nothing = np.zeros((2, 3), dtype=np.int64)
        try:
            pixels_HWC = self._decode(sample)
        except DataError as error:
            if self.options.on_bad_sample == "error":
                raise
            return _Prepared(sample, None, (0, 0), nothing, error.message)
        if self.options.store == "raw":
            payload = pixels_HWC.tobytes()
        else:
            payload = sample.image if isinstance(sample.image, bytes) else encode_png(_as_array(sample))
        flat = pixels_HWC.reshape(-1, 3).astype(np.int64)
        sums = np.stack([flat.sum(axis=0), (flat * flat).sum(axis=0)])
        return _Prepared(sample, payload, (pixels_HWC.shape[0], pixels_HWC.shape[1]), sums, "")

    def _decode(self, sample: RawSample) -> Pixels:
        if sample.image is None:
            raise DataError(f"no image at {sample.where}: restore it, or set on_bad_sample to skip")
        if isinstance(sample.image, bytes):
            return decode_image(sample.image, self.options.image_size, where=sample.where)
        return fit_array(sample.image, self.options.image_size, where=sample.where)

    def _accept(self, sample_id: int, done: _Prepared, router: Router, spill: Spill) -> None:
        """Runs on the calling thread, in source order, so that results do not depend on timing."""
        if done.payload is None:
            self.num_skipped += 1
            self.first_problem = self.first_problem or done.problem
            log.warning("skipped: %s", done.problem)
            return
        self._check_size(done)
        split, shard = router.shard(sample_id)
        self.counts[split][done.sample.label] += 1
        if split == "train":
            self._num_pixels += done.size[0] * done.size[1]
            for total, part in zip(self._sums, done.sums.tolist(), strict=True):
                total[:] = [a + b for a, b in zip(total, part, strict=True)]
        row = SpillRow(int(router.position_of[sample_id]), sample_id, done.sample.label, done.payload)
        spill.add(shard_name(split, shard), row)

    def _check_size(self, done: _Prepared) -> None:
        self._size = self._size or done.size
        if done.size != self._size or done.size[0] != done.size[1]:
            raise DataError(
                f"image at {done.sample.where} is {done.size[1]}x{done.size[0]} pixels, the first one was "
                f"{self._size[1]}x{self._size[0]}: without image_size all images must have one square size; "
                "set it"
            )

    def image_spec(self) -> ImageSpec:
        """Store and decode size; an empty first pass has none."""
        if self._size is None:
            raise DataError(f"no readable image in the source ({self.num_skipped} were skipped)")
        return ImageSpec(store=self.options.store, height=self._size[0], width=self._size[1])

    def statistics(self) -> tuple[list[float], list[float]]:
        """Channel mean and deviation over the train split's RGB in [0, 1], from exact integer sums."""
        n = self._num_pixels
        mean = [s / n / 255 for s in self._sums[0]]
        std = [math.sqrt(n * q - s * s) / n / 255 for s, q in zip(*self._sums, strict=True)]
        for channel, value in zip(("red", "green", "blue"), std, strict=True):
            if value == 0:
                raise DataError(
                    f"the {channel} channel has one value in all training images, so it cannot be "
                    "normalised: "
                    "look at the images"
                )
        return mean, std

    def warnings(self) -> list[str]:
        """One line on skipped images, if there were any."""
        if self.num_skipped == 0:
            return []
        return [f"{self.num_skipped} unreadable images were skipped; the first: {self.first_problem}"]


def shard_name(split: Split, shard: int) -> str:
    return f"{split}-{shard:05d}"


def _as_array(sample: RawSample) -> Pixels:
    assert isinstance(sample.image, np.ndarray), "bytes and None are dealt with before"
    return sample.image


def _chunks(rows: Iterable[tuple[int, RawSample]], num_samples: int) -> Iterator[list[tuple[int, RawSample]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, num_samples)):
        yield chunk
