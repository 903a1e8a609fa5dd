"""Shards to batches on a real cluster: cached or streamed, over any number of ranks, every row once."""

from __future__ import annotations

import io
import itertools
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from krd_ray.data.plan import train_plan
from krd_ray.data.reading import cache_blocks, tasks_of
from krd_ray.data.shard_set import Batch, ShardSet, sample_ids_of
from krd_ray.data.stream import eval_batches, train_batches
from krd_ray.errors import DataError

pytestmark = pytest.mark.usefixtures("cluster")
ALL_ROWS = 1 << 20


def epoch_of(
    shards: ShardSet, *, epoch: int = 0, rank: int = 0, world: int = 1, window: int = ALL_ROWS, seed: int = 3
) -> list[Batch]:
    plan = train_plan(shards.chunk_rows, seed=seed, epoch=epoch, rank=rank, world=world)
    batches = train_batches(
        shards, [plan], batch_size=24, seed=seed, first_epoch=epoch, rank=rank, window_rows=window
    )
    return list(batches)


def ids_in(batches: list[Batch]) -> list[int]:
    return [sample for batch in batches for sample in batch.sample_ids.tolist()]


def stored(shards: ShardSet) -> dict[int, tuple[int, bytes]]:
    """Label and decoded pixels by sample id, read without the package."""
    found: dict[int, tuple[int, bytes]] = {}
    for file in sorted(set(shards.files)):
        for row in pq.read_table(Path(shards.root) / file).to_pylist():
            pixels = row["image"]
            if shards.encoded:
                pixels = np.asarray(Image.open(io.BytesIO(pixels)).convert("RGB")).tobytes()
            found[row["sample_id"]] = (row["label"], pixels)
    return found


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a.sample_ids, b.sample_ids)
        and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.images_BHWC, b.images_BHWC)
        and np.array_equal(a.view_index, b.view_index)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("window", [50, ALL_ROWS])
def test_cached_streamed_raw_and_encoded_batches_are_the_same_to_the_bit(
    digits: Any, cached: ShardSet, window: int
) -> None:
    expected = epoch_of(cached, window=window)
    assert same(epoch_of(digits.raw, window=window), expected)
    assert same(epoch_of(digits.encoded, window=window), expected)
    if window == 50:
        assert same(epoch_of(cache_blocks(digits.encoded), window=window), expected)


def test_many_epochs_in_one_run_of_ray_data_are_those_read_one_by_one(digits: Any, cached: ShardSet) -> None:
    """Small row groups are then read several to a task."""
    apart = [batch for epoch in range(3, 7) for batch in epoch_of(cached, epoch=epoch, window=50)]
    for shards in (digits.raw, digits.encoded):
        plans = [train_plan(shards.chunk_rows, seed=3, epoch=e, rank=0, world=1) for e in range(3, 7)]
        pieces = [piece for plan in plans for piece in plan.pieces]
        assert max(map(len, tasks_of(pieces, shards.row_bytes))) > 4
        together = train_batches(shards, plans, batch_size=24, seed=3, first_epoch=3, rank=0, window_rows=50)
        assert same(list(together), apart)


def test_every_row_of_a_batch_is_what_the_shard_holds(digits: Any, cached: ShardSet) -> None:
    truth = stored(digits.raw)
    assert truth == stored(digits.encoded)
    for batch in epoch_of(cached, window=50):
        for sample, label, image in zip(batch.sample_ids, batch.labels, batch.images_BHWC, strict=True):
            assert truth[int(sample)] == (int(label), image.tobytes())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("window", [40, ALL_ROWS])
def test_each_sample_comes_once_per_epoch_over_all_ranks_but_for_those_left_out(
    cached: ShardSet, world: int, window: int
) -> None:
    in_file_order = sample_ids_of(cached)
    left_out_over_time: list[int] = []
    for epoch in range(3):
        per_rank = [
            ids_in(epoch_of(cached, epoch=epoch, rank=rank, world=world, window=window))
            for rank in range(world)
        ]
        left_out = in_file_order[
            list(train_plan(cached.chunk_rows, seed=3, epoch=epoch, rank=0, world=world).left_out)
        ].tolist()
        assert len({len(ids) for ids in per_rank}) == 1
        assert sorted([*itertools.chain(*per_rank), *left_out]) == sorted(in_file_order.tolist())
        left_out_over_time += left_out
    assert len(set(left_out_over_time)) == len(left_out_over_time) == 3 * (len(in_file_order) % world)


def test_both_two_and_three_ranks_leave_rows_out_in_these_tests(cached: ShardSet) -> None:
    assert all(cached.num_rows % world for world in (2, 3)), "choose a size that neither 2 nor 3 divides"


def test_an_epoch_repeats_itself_and_another_epoch_or_seed_is_another_order(cached: ShardSet) -> None:
    first = epoch_of(cached, epoch=1)
    assert same(epoch_of(cached, epoch=1), first)
    for other in (epoch_of(cached, epoch=2), epoch_of(cached, epoch=1, seed=4)):
        assert ids_in(other) != ids_in(first)
        assert sorted(ids_in(other)) == sorted(ids_in(first))


def test_only_the_last_batch_of_an_epoch_is_short(cached: ShardSet) -> None:
    sizes = [len(batch) for batch in epoch_of(cached, window=50)]
    assert sizes == [24] * (cached.num_rows // 24) + [cached.num_rows % 24]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_every_row_once_in_file_order(digits: Any, cached: ShardSet, world: int) -> None:
    for shards in (cached, digits.encoded):
        ranks = [list(eval_batches(shards, batch_size=24, rank=rank, world=world)) for rank in range(world)]
        assert ids_in([*itertools.chain(*ranks)]) == sample_ids_of(shards).tolist()


@pytest.mark.parametrize("cache", [False, True])
def test_a_rank_without_rows_evaluates_nothing(digits: Any, cache: bool) -> None:
    one_row = replace(digits.val, files=digits.val.files[:1], file_groups=(0,), chunk_rows=(1,))
    shards = cache_blocks(one_row) if cache else one_row
    counts = [sum(map(len, eval_batches(shards, batch_size=8, rank=k, world=3))) for k in range(3)]
    assert sorted(counts) == [0, 0, 1]


def test_batches_may_be_written_to(cached: ShardSet) -> None:
    for batch in (epoch_of(cached)[0], next(eval_batches(cached, batch_size=8))):
        batch.images_BHWC[:] = 0
    assert max(batch.images_BHWC.max() for batch in epoch_of(cached)) > 0


def test_caching_hands_the_driver_references_only(digits: Any, cached: ShardSet) -> None:
    assert cached.blocks is not None
    assert all(isinstance(block, ray.ObjectRef) for block in cached.blocks)
    without = len(pickle.dumps(replace(cached, blocks=None)))
    assert without == len(pickle.dumps(digits.raw)) < digits.raw.decoded_bytes / 10


def test_a_row_group_larger_than_ray_datas_block_size_stays_one_block(digits: Any) -> None:
    """Ray Data cuts blocks at 1.5 times its target size; windows and references count whole row groups."""
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    context.target_max_block_size = 1024
    try:
        small = epoch_of(digits.raw, window=50)
        assert len(cache_blocks(digits.raw).blocks or ()) == len(digits.raw.chunk_rows)
        assert same(small, epoch_of(cache_blocks(digits.raw), window=50))
        assert context.target_max_block_size == 1024, "the setting belongs to the user"
    finally:
        context.target_max_block_size = before


def broken_copy(shards: ShardSet, folder: Path, row: int) -> tuple[ShardSet, str, int]:
    """The first shard alone, with one image cut short; returns its file's name and the sample's id."""
    file = shards.files[0]
    table = pq.read_table(Path(shards.root) / file)
    images = table["image"].to_pylist()
    images[row] = images[row][:20]
    column = table.schema.get_field_index("image")
    table = table.set_column(column, "image", pa.array(images, table.schema.field(column).type))
    pq.write_table(table, folder / file, row_group_size=shards.chunk_rows[0])
    chunks = shards.files.count(file)
    kept = replace(
        shards,
        root=str(folder),
        files=shards.files[:chunks],
        file_groups=shards.file_groups[:chunks],
        chunk_rows=shards.chunk_rows[:chunks],
    )
    return kept, file, table["sample_id"][row].as_py()


def test_an_unreadable_image_is_named_by_shard_and_sample(digits: Any, tmp_path: Path) -> None:
    broken, file, sample = broken_copy(digits.encoded, tmp_path, row=5)
    for read in (lambda: epoch_of(broken), lambda: cache_blocks(broken)):
        with pytest.raises(DataError) as caught:
            read()
        assert type(caught.value) is DataError, "not wrapped: the message is all that is printed"
        assert file in str(caught.value)
        assert f"sample {sample}" in str(caught.value)
        assert "Traceback" not in str(caught.value)


def test_a_shard_that_vanished_is_named(digits: Any, tmp_path: Path) -> None:
    gone = replace(digits.raw, root=str(tmp_path))
    with pytest.raises(DataError, match=r"^\S+train-0000\d\.parquet, row group \d: cannot be read"):
        epoch_of(gone)
