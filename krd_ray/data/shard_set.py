"""Answers what a split looks like to a worker, and a batch of its rows.

Does not read images (`reading` does) and does not shuffle (`stream` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from krd_ray.data.manifest import Manifest
from krd_ray.errors import DataError
from krd_ray.storage.places import Folder, join


@dataclass(frozen=True)
class Batch:
    """Rows of one step: sample_id int64 [B], label int64 [B], image uint8 [B, side, side, 3] (RGB).

    view_index int64 [B] says which view of each image is trained on; it is 0 in evaluation, which has one view.
    """

    sample_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    images_BHWC: npt.NDArray[np.uint8]
    view_index: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True)
class ShardSet:
    """One split of a dataset as a worker sees it; `blocks` are its decoded chunks in the object store.

    `root` is the folder of the shards, or its URI; a node that reads images of a shard at a URI copies it once.
    """

    root: str
    files: tuple[str, ...]
    file_groups: tuple[int, ...]
    chunk_rows: tuple[int, ...]
    side: int
    encoded: bool
    blocks: tuple[Any, ...] | None = None
    checksums: tuple[str, ...] = ()

    @classmethod
    def open(cls, root: Path | str, manifest: Manifest, split: str, *, side: int | None = None) -> ShardSet:
        """Describes a split by its manifest; nothing is read.

        Raises:
            DataError: the split is not in the manifest, or raw shards are asked for at another size.
        """
        if split not in manifest.splits:
            raise DataError(f"{root}: there is no {split!r} split, only {', '.join(manifest.splits)}")
        encoded = manifest.image.store == "encoded"
        if not encoded and side not in (None, manifest.image.height):
            raise DataError(
                f"data.image_size is {side}, but the raw shards in {root} hold {manifest.image.height} px "
                "images; write them again with another --image-size, or as --store encoded"
            )
        chosen = side or manifest.image.height
        if chosen is None:
            raise DataError(f"{root}: encoded images of any size; set data.image_size, the side to decode to")
        shards = manifest.splits[split].shards
        return cls(
            root=str(root),
            files=tuple(shard.file for shard in shards for _ in shard.row_groups),
            file_groups=tuple(group for shard in shards for group in range(len(shard.row_groups))),
            chunk_rows=tuple(rows for shard in shards for rows in shard.row_groups),
            side=chosen,
            encoded=encoded,
            checksums=tuple(shard.sha256 for shard in shards for _ in shard.row_groups),
        )

    @property
    def num_rows(self) -> int:
        return sum(self.chunk_rows)

    @property
    def row_bytes(self) -> int:
        """Decoded bytes of one row: pixels, id, label."""
        return self.side * self.side * 3 + 12

    @property
    def decoded_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def sample_ids_of(shards: ShardSet) -> npt.NDArray[np.int64]:
    """Returns the sample ids of the split in file order, int64 [N]; reads that one column only."""
    return _column(shards, "sample_id")


def labels_of(shards: ShardSet) -> npt.NDArray[np.int64]:
    """Returns the labels of the split in file order, int64 [N]; reads that one column only."""
    return _column(shards, "label")


def _column(shards: ShardSet, name: str) -> npt.NDArray[np.int64]:
    files = list(dict.fromkeys(shards.files))
    folder = Folder.at(shards.root)
    tables = []
    for file in files:
        try:
            with folder.open(file) as content:
                tables.append(pq.read_table(content, columns=[name]))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{join(shards.root, file)}: cannot be read ({error}); copy it there again"
            ) from error
    return np.asarray(pa.concat_tables(tables)[name].to_numpy(), np.int64)
