"""Answers how rows reach their shard in random order when a set is larger than memory.

An external shuffle. Phase one appends each row to its shard's temporary file, through bounded buffers.
Phase two puts one shard at a time in order and writes it as Parquet. Knows nothing of images or splits.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from krd_ray.data.manifest import ImageSpec, ShardRecord
from krd_ray.storage.node_copies import sha256_of

ROW_OVERHEAD_BYTES = 256  # of a buffered row's Python objects, so that tiny images stay bounded too
# Positions order the rows inside the whole split; large_binary because a shard may exceed 2 GiB.
_SPILL_SCHEMA = pa.schema(
    [("position", pa.int64()), ("sample_id", pa.int64()), ("label", pa.int32()), ("image", pa.large_binary())]
)


@dataclass(frozen=True, slots=True)
class SpillRow:
    """One row on its way: position (its place in the split's permutation), sample_id, label, image bytes."""

    position: int
    sample_id: int
    label: int
    image: bytes


@dataclass
class Spill:
    """Phase one: rows buffered up to `buffer_bytes`, then appended to one temporary file per shard.

    Fields: folder (existing), buffer_bytes; peak_bytes tells the most that was ever buffered.
    Files are opened only while they are appended to, so the number of shards is not bound by open files.
    """

    folder: Path
    buffer_bytes: int
    peak_bytes: int = 0
    _buffered_bytes: int = 0
    _rows: defaultdict[str, list[SpillRow]] = field(default_factory=lambda: defaultdict(list))

    def add(self, shard: str, row: SpillRow) -> None:
        """Buffer one row of a shard; writes all buffers out when they are full."""
        self._rows[shard].append(row)
        self._buffered_bytes += len(row.image) + ROW_OVERHEAD_BYTES
        self.peak_bytes = max(self.peak_bytes, self._buffered_bytes)
        if self._buffered_bytes >= self.buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Append every buffered row to its shard's file."""
        for shard, rows in self._rows.items():
            columns = [
                pa.array([getattr(row, name) for row in rows], type=_SPILL_SCHEMA.field(name).type)
                for name in _SPILL_SCHEMA.names
            ]
            with self.path(shard).open("ab") as file, pa.ipc.new_stream(file, _SPILL_SCHEMA) as stream:
                stream.write_batch(pa.record_batch(columns, schema=_SPILL_SCHEMA))
        self._rows.clear()
        self._buffered_bytes = 0

    def path(self, shard: str) -> Path:
        """The shard's temporary file; it exists only if the shard got a row."""
        return self.folder / f"{shard}.spill"


def write_shard(spilled: Path, out_file: Path, image: ImageSpec, row_group_rows: int) -> ShardRecord:
    """Phase two: order one shard's rows by position and write them as Parquet, atomically and durably.

    Memory: one shard and one row group. No compression: encoded images do
    not shrink, raw pixels shrink by about a third but then cost the reader more than the disk does.

    Args:
        spilled: the shard's temporary file; removed afterwards.
        out_file: the Parquet file; appears under its name only when complete.
        image: how images are stored.
        row_group_rows: rows per row group, >= 1.
    Returns:
        The file's record for the manifest.
    """
    schema = shard_schema(image)
    partial = spilled.with_suffix(".parquet")
    row_groups = []
    with pa.memory_map(str(spilled)) as mapped:
        rows = _read_spill(mapped)
        order = np.argsort(rows.column("position").to_numpy(), kind="stable")
        with pq.ParquetWriter(partial, schema, **PARQUET_SETTINGS) as writer:
            for start in range(0, len(order), row_group_rows):
                group = rows.take(order[start : start + row_group_rows]).select(schema.names).cast(schema)
                writer.write_table(group, row_group_size=row_group_rows)
                row_groups.append(len(group))
        del rows
    num_bytes, sha256 = hash_file(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(out_file)
    spilled.unlink()
    return ShardRecord(
        file=out_file.name,
        num_rows=sum(row_groups),
        row_groups=row_groups,
        num_bytes=num_bytes,
        sha256=sha256,
    )


def shard_schema(image: ImageSpec) -> pa.Schema:
    """Columns of every shard: the format itself.

    Args:
        image: how images are stored.
    Returns:
        sample_id int64, label int32, image: binary if encoded, binary of H * W * 3 bytes (row-major) if raw.
    Example:
        >>> shard_schema(ImageSpec(store="raw", height=2, width=2)).field("image").type.byte_width
        12
    """
    num_values = image.height * image.width * image.channels
    image_type = pa.binary(num_values) if image.store == "raw" else pa.binary()
    return pa.schema([("sample_id", pa.int64()), ("label", pa.int32()), ("image", image_type)])


def hash_file(path: Path) -> tuple[int, str]:
    """Size and checksum of a file.

    Args:
        path: existing file.
    Returns:
        Number of bytes, hex SHA-256.
    """
    return path.stat().st_size, sha256_of(path)


def _read_spill(mapped: pa.MemoryMappedFile) -> pa.Table:
    """All streams that were appended to the file, one after the other, as one table in memory."""
    tables = []
    while mapped.tell() < mapped.size():
        with pa.ipc.open_stream(mapped) as stream:
            tables.append(stream.read_all())
    return pa.concat_tables(tables).combine_chunks()


# Statistics and dictionaries over image bytes only cost time; minimum and maximum would store two images.
PARQUET_SETTINGS = {
    "compression": "none",
    "use_dictionary": ["label"],
    "write_statistics": ["sample_id", "label"],
}
