"""Answers how row groups become pixels in memory: Ray Data reads and decodes them, a few per task.

Does not write shards, plan or shuffle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from krd_ray.data.images import decode_batch
from krd_ray.data.plan import Piece
from krd_ray.data.remote_errors import unwrapped
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.errors import DataError
from krd_ray.storage.node_copies import node_file
from krd_ray.storage.places import join

READ_CPUS = 0.25
# Decoded. Ray Data spends some 10 ms on each task, as long as reading 1,000 raw CIFAR images takes.
TASK_BYTES = 32 << 20


def cache_blocks(shards: ShardSet) -> ShardSet:
    """Reads and decodes the split once into the object store, by Ray Data; only references come back."""
    pieces = [Piece(chunk, 0, rows) for chunk, rows in enumerate(shards.chunk_rows)]
    with unwrapped():
        blocks = tuple(_dataset(shards, [(piece,) for piece in pieces]).materialize().to_arrow_refs())
    if len(blocks) != len(pieces):
        raise DataError(f"{shards.root}: Ray Data made {len(blocks)} blocks of {len(pieces)} row groups")
    return ShardSet(**{**shards.__dict__, "blocks": blocks})


def blocks_of(shards: ShardSet, pieces: Sequence[Piece]) -> Iterator[Batch]:
    """Yields the pieces as arrays, from the object store where they are cached, else read by Ray Data in one run."""
    if shards.blocks is None:
        tables = _read(shards, list(tasks_of(pieces, shards.row_bytes)))
    else:
        tables = (ray.get(shards.blocks[p.chunk]).slice(p.start, p.num_rows) for p in pieces)
    with unwrapped():
        for table in tables:
            yield block_arrays(table, shards.side)


def block_arrays(table: pa.Table, side: int) -> Batch:
    """Views of the table's memory where it is one chunk; nothing is copied but labels."""
    column = table["image"]
    image = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which always copies
    image_bytes = side * side * 3  # not ShardSet.row_bytes, which counts id and label too
    flat = np.frombuffer(image.buffers()[1], dtype=np.uint8)
    flat = flat[image.offset * image_bytes : (image.offset + len(image)) * image_bytes]
    return Batch(
        table["sample_id"].to_numpy(),
        table["label"].to_numpy().astype(np.int64),
        flat.reshape(len(image), side, side, 3),
        np.zeros(len(image), np.int64),
    )


def tasks_of(pieces: Sequence[Piece], row_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Cuts the pieces into what one Ray task reads: first a single one, then twice as much, up to TASK_BYTES.

    So the first rows come soon, and the many after them cost little more than reading.

    Example:
        >>> pieces = [Piece(chunk, 0, 1024) for chunk in range(9)]
        >>> [len(task) for task in tasks_of(pieces, row_bytes=3072)]
        [1, 2, 4, 2]
    """
    task: list[Piece] = []
    held, limit = 0, 0
    for piece in pieces:
        size = piece.num_rows * row_bytes
        if task and held + size > limit:
            yield tuple(task)
            limit = min(2 * max(held, limit), TASK_BYTES)
            task, held = [], 0
        task.append(piece)
        held += size
    if task:
        yield tuple(task)


def read_piece(shards: ShardSet, piece: Piece) -> pa.Table:
    """Reads one row group, decodes it if need be and cuts the rows out; runs in a Ray task."""
    file = shards.files[piece.chunk]
    place = join(shards.root, file)
    where = f"{place}, row group {shards.file_groups[piece.chunk]}"
    try:
        with pq.ParquetFile(node_file(place, sha256=shards.checksums[piece.chunk])) as parquet:
            table = parquet.read_row_group(
                shards.file_groups[piece.chunk], columns=["sample_id", "label", "image"]
            )
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(
            f"{where}: cannot be read ({error}); write the shards again with `krd shards`"
        ) from error
    table = table.slice(piece.start, piece.num_rows)
    return _decode(table, shards.side, where) if shards.encoded else table


class _Chunks(Datasource):
    """Row groups as a Ray Data source: one read task and one block per entry of `tasks`, in the given order."""

    def __init__(self, shards: ShardSet, tasks: Sequence[Sequence[Piece]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards, self._tasks = shards, tasks

    def estimate_inmemory_data_size(self) -> int:
        return sum(piece.num_rows for task in self._tasks for piece in task) * self._shards.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        del parallelism, per_task_row_limit, data_context  # tasks as they were cut: the order is known
        return [self._read_task(task) for task in self._tasks]

    def _read_task(self, task: Sequence[Piece]) -> ReadTask:
        rows = sum(piece.num_rows for piece in task)
        metadata = BlockMetadata(rows, rows * self._shards.row_bytes, None, None)
        return ReadTask(functools.partial(_read_pieces, self._shards, task), metadata)


def _dataset(shards: ShardSet, tasks: Sequence[Sequence[Piece]]) -> Any:
    """One block per task, in their order; settings are made on this dataset's own context."""
    dataset = ray.data.read_datasource(
        _Chunks(shards, tasks), override_num_blocks=len(tasks), num_cpus=READ_CPUS
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.target_max_block_size = None  # else Ray Data cuts blocks above some 190 MB in two
    return dataset


def _read(shards: ShardSet, tasks: Sequence[Sequence[Piece]]) -> Iterator[pa.Table]:
    """The pieces of the tasks, one after another."""
    blocks = _dataset(shards, tasks).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for task, block in zip(tasks, blocks, strict=True):
        start = 0
        for piece in task:
            yield block.slice(start, piece.num_rows)
            start += piece.num_rows


def _read_pieces(shards: ShardSet, pieces: Sequence[Piece]) -> list[pa.Table]:
    tables = [read_piece(shards, piece) for piece in pieces]
    return [pa.concat_tables(tables).combine_chunks()]  # contiguous, so that whoever reads it only looks


def _decode(table: pa.Table, side: int, where: str) -> pa.Table:
    ids = table["sample_id"].to_pylist()
    pixels = decode_batch(table["image"].to_pylist(), side, where=lambda row: f"{where}, sample {ids[row]}")
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(side * side * 3), len(pixels), [None, pa.py_buffer(pixels)]
    )
    return table.set_column(table.schema.get_field_index("image"), "image", column)
