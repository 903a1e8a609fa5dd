"""Answers how many rows per second krd_ray's stream gives, and a torch DataLoader over the same shards.

The peer is written tightly: row groups read with PyArrow, shuffled in windows of the same size, cut into batches of
uint8; it decodes encoded images anew each epoch. Both hand over the same rows; the same view function follows. A
worker is a process besides the one that trains.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from ray.data import DataContext, ExecutionResources
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.data_path.images import SIDE, write_splits
from benchmarks.data_path.turns import BATCH, VIEW, rotated
from krd_ray.config import RayConfig
from krd_ray.data.plan import train_plan
from krd_ray.data.reading import READ_CPUS, cache_blocks
from krd_ray.data.shard_set import ShardSet
from krd_ray.data.stream import train_batches
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.train.cluster import connected

WINDOW_ROWS = 2048
EPOCHS = 8  # in a turn, one after another, as training reads them
# images uint8 [B, S, S, 3], ids int64 [B], views int64 [B]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PeerRows(IterableDataset[Rows]):
    """What a careful user of PyArrow and torch writes: shuffled row groups, a window, batches by one gather."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._epoch = shards, 0

    def __iter__(self) -> Iterator[Rows]:
        self._epoch += 1
        generator = np.random.default_rng(self._epoch)
        held: list[tuple[np.ndarray, np.ndarray]] = []
        left = len(self._shards.chunk_rows)
        for chunk in generator.permutation(left).tolist():
            held.append(self._read(chunk))
            left -= 1
            num_rows = sum(len(ids) for _, ids in held)
            if num_rows >= WINDOW_ROWS or left == 0:
                images, ids = (np.concatenate([part[k] for part in held]) for k in (0, 1))
                order = generator.permutation(num_rows)
                keep = num_rows % BATCH if left else 0
                for start in range(0, num_rows - keep, BATCH):
                    rows = order[start : min(start + BATCH, num_rows - keep)]
                    views = np.full(len(rows), self._epoch)
                    yield torch.from_numpy(images[rows]), torch.from_numpy(ids[rows]), torch.from_numpy(views)
                rows = order[num_rows - keep :]
                held = [(images[rows], ids[rows])]

    def _read(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._shards
        with pq.ParquetFile(Path(shards.root) / shards.files[chunk]) as file:
            table = file.read_row_group(shards.file_groups[chunk], columns=["sample_id", "label", "image"])
        column = table["image"].chunk(0)
        if shards.encoded:
            decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in column.to_pylist()]
            images = np.stack(decoded)
        else:
            images = np.frombuffer(column.buffers()[1], np.uint8).reshape(len(column), SIDE, SIDE, 3)
        return images, table["sample_id"].to_numpy()


def stream_rows(shards: ShardSet, first_epoch: int) -> Iterator[Rows]:
    """EPOCHS epochs of krd_ray's training stream."""
    epochs = range(first_epoch, first_epoch + EPOCHS)
    plans = [train_plan(shards.chunk_rows, seed=0, epoch=epoch, rank=0, world=1) for epoch in epochs]
    batches = train_batches(
        shards, plans, batch_size=BATCH, seed=0, first_epoch=first_epoch, rank=0, window_rows=WINDOW_ROWS
    )
    for batch in batches:
        yield tuple(map(torch.from_numpy, (batch.images_BHWC, batch.sample_ids, batch.view_index)))


def peer_rows(loader: DataLoader[Rows]) -> Iterator[Rows]:
    """EPOCHS epochs of a DataLoader; its workers go on from one to the next."""
    for _ in range(EPOCHS):
        yield from loader


def turn_s(rows: Iterator[Rows], view: ViewSpec | None) -> tuple[float, float, int]:
    """Seconds of a turn and to its first batch, and a sum that is the same for the same rows."""
    started, first_s, names = time.perf_counter(), 0.0, 0
    for images, ids, views in rows:
        if view is not None:
            train_view(images, ids, views, view)
        first_s = first_s or time.perf_counter() - started
        names += int((ids * ids + 1).sum())
    return time.perf_counter() - started, first_s, names


def stream_part(folder: Path, num_rows: int, rounds: int) -> list[dict[str, Any]]:
    """Rows per second of every loader over every store, with and without the view."""
    entries = []
    one_reader = DataContext.get_current().execution_options
    one_reader.resource_limits = ExecutionResources(cpu=READ_CPUS)
    with connected(RayConfig(num_cpus=1, object_store_bytes=512 << 20)):
        for store, shards in write_splits(folder, num_rows).items():
            cached = cache_blocks(shards)
            peers = {
                workers: DataLoader(
                    PeerRows(shards),
                    batch_size=None,
                    num_workers=workers,
                    persistent_workers=workers > 0,
                    multiprocessing_context="spawn" if workers else None,
                )
                for workers in (0, 1)
            }
            loaders: dict[str, Callable[[int], Iterator[Rows]]] = {
                "krd cached": lambda first, shards=cached: stream_rows(shards, first),
                "krd streamed": lambda first, shards=shards: stream_rows(shards, first),
                "torch, 0 workers": lambda _, peer=peers[0]: peer_rows(peer),
                "torch, 1 worker": lambda _, peer=peers[1]: peer_rows(peer),
            }
            entries += measured_loaders(store, loaders, shards.num_rows, rounds)
            del peers, loaders
    return entries


def measured_loaders(
    store: str, loaders: dict[str, Callable[[int], Iterator[Rows]]], num_rows: int, rounds: int
) -> list[dict[str, Any]]:
    """Turns of all loaders, EPOCHS epochs each; the first round warms up and does not count."""
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    seen = set()
    for number in range(rounds + 1):
        for name in rotated(list(loaders), number):
            for with_view in (False, True):
                total, first, names = turn_s(loaders[name](number * EPOCHS), VIEW if with_view else None)
                seen.add(names)
                if number:
                    times.setdefault((name, with_view), []).append((total, first))
    assert len(seen) == 1, "a loader gave other rows than the others"
    return [
        {
            "store": store,
            "loader": name,
            "view": with_view,
            "rows_per_s": round(EPOCHS * num_rows / median(total for total, _ in taken)),
            "first_batch_ms": round(1e3 * median(first for _, first in taken), 2),
            "turns_s": [round(total, 4) for total, _ in taken],
        }
        for (name, with_view), taken in times.items()
    ]
