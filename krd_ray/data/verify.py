"""Answers whether a folder of shards is what its manifest promises, before a run spends hours on it.

Repairs nothing and decodes no image: unreadable images are found when the shards are written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krd_ray.data.manifest import ImageSpec, Manifest, ShardRecord, SplitRecord
from krd_ray.data.shard_spill import hash_file, shard_schema
from krd_ray.errors import DataError
from krd_ray.maths.longtail import IntArray
from krd_ray.storage.node_copies import node_file
from krd_ray.storage.places import Folder, Version, join

ADVICE = "write the shards again with `krd shards`, overwriting them"


def verify_dataset(root: Path | str, *, full: bool) -> Manifest:
    """Compare a folder of shards with its manifest.

    Always: the manifest, class counts, and per shard existence, size, footer, columns and row groups; a few
    milliseconds per shard. Full: also reads every file for labels, ids, missing images and the checksum; files at a
    URI are copied to this node for that.

    Args:
        root: folder with `dataset.json`, or its URI.
        full: read the files' contents too.
    Returns:
        The manifest.
    Raises:
        DataError: the first disagreement, naming the file and, where known, row and sample_id.
    """
    manifest = Manifest.load(root)
    _verify_classes(manifest)
    folder = Folder.at(root)
    found = folder.files()
    for split in manifest.splits.values():
        for shard in split.shards:
            _verify_structure(folder, found, shard, manifest.image)
    if full:
        _verify_content(str(root), manifest)
    return manifest


def _verify_classes(manifest: Manifest) -> None:
    for c, count in enumerate(manifest.splits["train"].class_counts):
        if count == 0:
            raise DataError(
                f"class {c} ({manifest.classes[c]!r}) has no training image: add images to the source, or "
                "remove "
                f"the class from it, then {ADVICE}"
            )


def _verify_structure(
    folder: Folder, found: dict[str, Version], shard: ShardRecord, image: ImageSpec
) -> None:
    if shard.file not in found:
        raise DataError(f"shard {shard.file} is missing from {folder.place}: copy it there, or {ADVICE}")
    num_bytes, _ = found[shard.file]
    if num_bytes != shard.num_bytes:
        raise DataError(
            f"shard {shard.file} has {num_bytes} bytes, the manifest says {shard.num_bytes}: it was "
            "truncated or "
            f"replaced; copy it again, or {ADVICE}"
        )
    try:
        with folder.open(shard.file) as content, pq.ParquetFile(content) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"shard {shard.file} has no readable Parquet footer: {error}; {ADVICE}") from error
    for expected in shard_schema(image):
        if expected.name not in schema.names:
            raise DataError(
                f"shard {shard.file} has no column {expected.name!r}, only {schema.names}; {ADVICE}"
            )
        found = schema.field(expected.name).type
        if found != expected.type:
            raise DataError(
                f"shard {shard.file}: column {expected.name!r} is {found}, the manifest asks for "
                f"{expected.type}; "
                f"{ADVICE}"
            )
    row_groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if row_groups != shard.row_groups:
        raise DataError(
            f"shard {shard.file} has {sum(row_groups)} rows in {len(row_groups)} row groups, the manifest "
            "says "
            f"{shard.num_rows} in {len(shard.row_groups)}; {ADVICE}"
        )


def _verify_content(root: str, manifest: Manifest) -> None:
    """Contents first, checksum after: the message that tells more wins."""
    ids: list[IntArray] = []
    shards: list[ShardRecord] = []
    for name, split in manifest.splits.items():
        counts = np.zeros(manifest.num_classes, dtype=np.int64)
        for shard in split.shards:
            sample_ids, labels = _read_shard(root, shard)
            _verify_labels(shard, sample_ids, labels, manifest.num_classes)
            counts += np.bincount(labels, minlength=manifest.num_classes)
            ids.append(sample_ids)
            shards.append(shard)
        _verify_counts(name, split, counts, manifest.classes)
    _verify_unique(shards, ids)
    for split in manifest.splits.values():
        for shard in split.shards:
            _, sha256 = hash_file(_here(root, shard))
            if sha256 != shard.sha256:
                raise DataError(
                    f"shard {shard.file} has another checksum than the manifest: its content changed; copy "
                    "it again, "
                    f"or {ADVICE}"
                )


def _here(root: str, shard: ShardRecord) -> Path:
    return node_file(join(root, shard.file), sha256=shard.sha256)


def _read_shard(root: str, shard: ShardRecord) -> tuple[IntArray, IntArray]:
    """sample_id [n] and label [n] of one shard, with a look at every image cell, one row group at a time."""
    ids: list[IntArray] = []
    labels: list[IntArray] = []
    start = 0
    try:
        with pq.ParquetFile(_here(root, shard)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["sample_id", "label", "image"])
                _verify_cells(shard, table, start)
                ids.append(table.column("sample_id").to_numpy().astype(np.int64))
                labels.append(table.column("label").to_numpy().astype(np.int64))
                start += len(table)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"shard {shard.file} is damaged after row {start}: {error}; {ADVICE}") from error
    return np.concatenate(ids), np.concatenate(labels)


def _verify_cells(shard: ShardRecord, table: pa.Table, start: int) -> None:
    empty = pc.equal(pc.binary_length(table.column("image")), 0)
    checks = {name: pc.is_null(table.column(name)) for name in table.column_names}
    checks["image"] = pc.or_kleene(checks["image"], pc.fill_null(empty, True))
    for name, bad in checks.items():
        rows = np.flatnonzero(bad.to_numpy())
        if len(rows):
            sample_id = table.column("sample_id")[int(rows[0])].as_py()
            raise DataError(
                f"shard {shard.file}, row {start + int(rows[0])}, sample_id {sample_id}: {name} is empty; "
                f"{ADVICE}"
            )


def _verify_labels(shard: ShardRecord, sample_ids: IntArray, labels: IntArray, num_classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"shard {shard.file}, row {row}, sample_id {sample_ids[row]}: label {labels[row]} is outside "
            f"0..{num_classes - 1}; correct the source's labels, then {ADVICE}"
        )


def _verify_counts(name: str, split: SplitRecord, counts: IntArray, classes: list[str]) -> None:
    different = np.flatnonzero(counts != np.array(split.class_counts))
    if len(different):
        c = int(different[0])
        raise DataError(
            f"split {name}: class {c} ({classes[c]!r}) has {counts[c]} images in the shards, the manifest "
            "says "
            f"{split.class_counts[c]}; {ADVICE}"
        )


def _verify_unique(shards: list[ShardRecord], ids: list[IntArray]) -> None:
    """No sample_id twice, within a shard or across shards and splits."""
    every = np.concatenate(ids)
    order = np.argsort(every, kind="stable")
    twice = np.flatnonzero(np.diff(every[order]) == 0)
    if len(twice):
        starts = np.cumsum([0] + [len(part) for part in ids])
        first, second = (_locate(shards, starts, int(order[twice[0] + i])) for i in (0, 1))
        raise DataError(
            f"sample_id {every[order[twice[0]]]} appears twice: in {first} and in {second}; ids must be "
            "unique over "
            f"all splits, so {ADVICE}"
        )


def _locate(shards: list[ShardRecord], starts: IntArray, row: int) -> str:
    k = int(np.searchsorted(starts, row, side="right")) - 1
    return f"shard {shards[k].file}, row {row - int(starts[k])}"
