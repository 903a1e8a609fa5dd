"""Answers how shards become batches: Ray Data reads and decodes, this file shuffles and cuts.

Does not write shards and knows neither teacher nor student. With cached blocks or read afresh each epoch, the
batches are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from krd_ray.data.images import decode_image
from krd_ray.data.manifest import Manifest
from krd_ray.data.plan import EpochPlan, IntArray, Piece, Repeats, eval_plan, shuffle_window
from krd_ray.data.remote_errors import unwrapped
from krd_ray.errors import DataError
from krd_ray.maths.samplers import view_of_copy
from krd_ray.storage.node_copies import node_file
from krd_ray.storage.places import Folder, join

READ_CPUS = 0.25


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
    def decoded_bytes(self) -> int:
        return self.num_rows * (self.side * self.side * 3 + 12)


def cache_blocks(shards: ShardSet) -> ShardSet:
    """Reads and decodes the split once into the object store, by Ray Data; only references come back."""
    pieces = [Piece(chunk, 0, rows) for chunk, rows in enumerate(shards.chunk_rows)]
    with unwrapped():
        blocks = tuple(_dataset(shards, pieces).materialize().to_arrow_refs())
    if len(blocks) != len(pieces):
        raise DataError(f"{shards.root}: Ray Data made {len(blocks)} blocks of {len(pieces)} row groups")
    return ShardSet(**{**shards.__dict__, "blocks": blocks})


def train_batches(
    shards: ShardSet,
    plan: EpochPlan,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    window_rows: int,
    cycle: int | None = None,
) -> Iterator[Batch]:
    """Yields the plan's rows in shuffled batches: chunks in plan order, rows shuffled inside a window.

    A row that the plan repeats is read once and stands in memory once; its copy k takes view epoch + k.

    Args:
        shards: the split.
        plan: this rank's share, from `train_plan`.
        batch_size: rows of a batch; the last one may be smaller.
        seed, epoch, rank: name the shuffle.
        window_rows: rows shuffled together; at least the rank's rows gives a full shuffle.
        cycle: number of different views per image; None: no bound.
    Returns:
        Batches that together hold each row of the plan exactly as often as it says.
    """
    held: list[_Rows] = []
    held_rows, window, left = 0, 0, plan.num_rows
    for block, repeats in zip(_blocks(shards, plan.pieces), plan.repeats, strict=True):
        held.append(_taken(block, repeats, epoch, cycle))
        held_rows += len(held[-1])
        left -= len(held[-1])
        if held_rows >= window_rows or left == 0:
            rows = _join(held)
            order = shuffle_window(held_rows, seed=seed, epoch=epoch, rank=rank, window=window)
            keep = held_rows % batch_size if left else 0
            yield from _cut_batches(rows, order[: held_rows - keep], batch_size)
            held = [_whole(rows.batch(order[held_rows - keep :]))] if keep else []
            held_rows, window = keep, window + 1


def eval_batches(shards: ShardSet, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yields this rank's part of the split in file order, each row once."""
    for block in _blocks(shards, eval_plan(shards.chunk_rows, rank=rank, world=world)):
        yield from _cut_batches(_whole(block), np.arange(len(block)), batch_size)


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


@dataclass(frozen=True)
class _Rows:
    """Rows that wait to be shuffled: `index` [n] into the images at hand, each of which may be meant many times."""

    images: Batch
    index: IntArray
    view_index: IntArray

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, places: IntArray) -> Batch:
        """Copies out the rows at the places."""
        index, images = self.index[places], self.images
        return Batch(
            images.sample_ids[index],
            images.labels[index],
            images.images_BHWC[index],
            self.view_index[places],
        )


def _whole(block: Batch) -> _Rows:
    return _Rows(block, np.arange(len(block)), block.view_index)


def _taken(block: Batch, repeats: Repeats | None, epoch: int, cycle: int | None) -> _Rows:
    """What an epoch takes of a piece; images that it does not take are let go."""
    if repeats is None:
        once = np.zeros(len(block), np.int64)
        return _Rows(block, np.arange(len(block)), view_of_copy(once, epoch=epoch, cycle=cycle))
    used, index = np.unique(repeats.rows, return_inverse=True)
    images = block if len(used) == len(block) else _whole(block).batch(used)
    return _Rows(images, index, view_of_copy(repeats.copies, epoch=epoch, cycle=cycle))


def _cut_batches(rows: _Rows, order: IntArray, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(order), batch_size):
        yield rows.batch(order[start : start + batch_size])


def _join(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    images = [part.images for part in parts]
    first = np.cumsum([0, *(len(each) for each in images[:-1])])
    return _Rows(
        Batch(
            np.concatenate([each.sample_ids for each in images]),
            np.concatenate([each.labels for each in images]),
            np.concatenate([each.images_BHWC for each in images]),
            np.concatenate([each.view_index for each in images]),
        ),
        np.concatenate([part.index + offset for part, offset in zip(parts, first.tolist(), strict=True)]),
        np.concatenate([part.view_index for part in parts]),
    )


def _blocks(shards: ShardSet, pieces: Sequence[Piece]) -> Iterator[Batch]:
    """The pieces as arrays, from the object store where they are cached, else read by Ray Data."""
    if shards.blocks is None:
        tables: Iterable[pa.Table] = _dataset(shards, pieces).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=2
        )
    else:
        tables = (ray.get(shards.blocks[p.chunk]).slice(p.start, p.num_rows) for p in pieces)
    with unwrapped():
        for table in tables:
            yield block_arrays(table, shards.side)


def block_arrays(table: pa.Table, side: int) -> Batch:
    """Views of the table's memory where it is one chunk; nothing is copied but labels."""
    column = table["image"].combine_chunks()
    image = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    row_bytes = side * side * 3
    flat = np.frombuffer(image.buffers()[1], dtype=np.uint8)
    flat = flat[image.offset * row_bytes : (image.offset + len(image)) * row_bytes]
    return Batch(
        table["sample_id"].to_numpy(),
        table["label"].to_numpy().astype(np.int64),
        flat.reshape(len(image), side, side, 3),
        np.zeros(len(image), np.int64),
    )


class _Chunks(Datasource):
    """Row groups as a Ray Data source: one read task and one block per piece, in the given order."""

    def __init__(self, shards: ShardSet, pieces: Sequence[Piece]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards, self._pieces = shards, pieces

    def estimate_inmemory_data_size(self) -> int:
        return self._shards.decoded_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        del parallelism, per_task_row_limit, data_context  # one task per piece keeps the order known
        row_bytes = self._shards.side**2 * 3 + 12
        return [
            ReadTask(
                functools.partial(read_piece, self._shards, piece),
                BlockMetadata(piece.num_rows, piece.num_rows * row_bytes, None, None),
            )
            for piece in self._pieces
        ]


def _dataset(shards: ShardSet, pieces: Sequence[Piece]) -> Any:
    """One block per piece, in their order; settings are made on this dataset's own context."""
    dataset = ray.data.read_datasource(
        _Chunks(shards, pieces), override_num_blocks=len(pieces), num_cpus=READ_CPUS
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.target_max_block_size = None  # else Ray Data cuts pieces above some 190 MB in two
    return dataset


def read_piece(shards: ShardSet, piece: Piece) -> list[pa.Table]:
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
    return [_decode(table, shards.side, where) if shards.encoded else table.combine_chunks()]


def _decode(table: pa.Table, side: int, where: str) -> pa.Table:
    ids = table["sample_id"].to_pylist()
    images = [
        decode_image(data, side, where=f"{where}, sample {ids[row]}").tobytes()
        for row, data in enumerate(table["image"].to_pylist())
    ]
    column = pa.array(images, type=pa.binary(side * side * 3))
    return table.set_column(table.schema.get_field_index("image"), "image", column)
