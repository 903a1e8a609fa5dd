"""Answers whether a worker's batches hold the rows, the views and the pixels that the epoch's plan says.

Does not start Ray: blocks are read by the function that Ray's tasks call, or made up.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from krd_ray.config import SamplerConfig
from krd_ray.data import reading, stream
from krd_ray.data.plan import Piece, train_plan
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import Batch, ShardSet, sample_ids_of
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.data.stream import train_batches
from krd_ray.maths.samplers import SAMPLERS, expected_copies
from krd_ray.train import epoch_rows
from krd_ray.train.epoch_rows import EpochRows, RowSettings

CPU = torch.device("cpu")
ALL_ROWS = 1 << 20


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, tuple[int, ...]]:
    """Some 400 long-tailed digits in uneven row groups, and the class counts."""
    root = tmp_path_factory.mktemp("digits")
    options = ShardOptions(
        imbalance_ratio=20, n_max=119, val_per_class=3, store="raw", image_size=8,
        rows_per_shard=150, row_group_rows=32,
    )  # fmt: skip
    manifest = write_shards(open_source(SourceSpec(kind="digits")), root, options)
    return ShardSet.open(root, manifest, "train"), tuple(manifest.splits["train"].class_counts)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Piece]:
    """Pieces that were read, in this process."""
    done: list[Piece] = []

    def blocks(shards: ShardSet, pieces: Sequence[Piece]) -> Iterator[Batch]:
        for piece in pieces:
            done.append(piece)
            table = reading.read_piece(shards, piece)
            yield reading.block_arrays(table, shards.side)

    monkeypatch.setattr(stream, "blocks_of", blocks)
    return done


def rows_of(
    digits: tuple[ShardSet, tuple[int, ...]], rank: int = 0, world: int = 1, **changes: Any
) -> EpochRows:
    shards, class_counts = digits
    given: dict[str, Any] = {
        "sampler": SamplerConfig(name="class_balanced"), "class_counts": class_counts, "seed": 3, "batch_size": 24,
        "window_rows": ALL_ROWS, "cycle": None, "rank": rank, "world": world,
    }  # fmt: skip
    return EpochRows(shards, RowSettings(**(given | changes)))


def truth_of(shards: ShardSet) -> dict[int, tuple[int, bytes]]:
    """Label and pixels by sample id, read without the package."""
    return {
        row["sample_id"]: (row["label"], row["image"])
        for file in sorted(set(shards.files))
        for row in pq.read_table(Path(shards.root) / file).to_pylist()
    }


def pairs_in(batches: Sequence[Batch]) -> Counter[tuple[int, int]]:
    """How often each (sample, view) comes."""
    return Counter(
        pair for b in batches for pair in zip(b.sample_ids.tolist(), b.view_index.tolist(), strict=True)
    )


def made_up_blocks(shards: ShardSet, pieces: Sequence[Piece]) -> Iterator[Batch]:
    first = np.concatenate([[0], np.cumsum(shards.chunk_rows)])
    for piece in pieces:
        rows = np.arange(first[piece.chunk] + piece.start, first[piece.chunk] + piece.stop)
        images = np.repeat((rows % 251).astype(np.uint8), 12).reshape(-1, 2, 2, 3)
        yield Batch(rows * 7 + 3, rows % 5, images, np.zeros(len(rows), np.int64))


@pytest.mark.parametrize(
    ("chunk_rows", "digest"),
    [
        ((32,) * 6, "7bc8d3ea0b0c1f13"),
        ((5, 31, 1, 17, 64, 9, 0, 40), "5e9a3d99d22bfe39"),
        ((50,), "12e2f7ab2c346ace"),
    ],
)
def test_batches_without_a_sampler_stay_what_they_were(
    chunk_rows: tuple[int, ...], digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded before there were samplers, over ranks, epochs and windows."""
    monkeypatch.setattr(stream, "blocks_of", made_up_blocks)
    shards = ShardSet("", ("",) * len(chunk_rows), tuple(range(len(chunk_rows))), chunk_rows, 2, False)
    lines = []
    for world, epoch in [(world, epoch) for world in (1, 2, 3, 5) for epoch in (0, 1, 7)]:
        for rank in range(world):
            plan = train_plan(chunk_rows, seed=11, epoch=epoch, rank=rank, world=world)
            for window in (20, 1000):
                for batch in train_batches(
                    shards, [plan], batch_size=8, seed=11, first_epoch=epoch, rank=rank, window_rows=window
                ):
                    assert (batch.view_index == epoch).all()
                    pixels = batch.images_BHWC[:, 0, 0, 0].tolist()
                    lines.append(repr((batch.sample_ids.tolist(), batch.labels.tolist(), pixels)))
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("window", [50, ALL_ROWS])
def test_batches_hold_every_copy_in_its_own_view_and_read_each_piece_once(
    digits: tuple[ShardSet, tuple[int, ...]], reads: list[Piece], world: int, window: int
) -> None:
    shards, epoch = digits[0], 4
    truth, by_rank = truth_of(shards), []
    for rank in range(world):
        rows = rows_of(digits, rank, world, window_rows=window)
        plan = rows.plan(epoch)
        reads.clear()
        by_rank.append(list(rows.batches(epoch, epoch + 1)))
        assert reads == list(plan.pieces)
        sizes = [len(batch) for batch in by_rank[-1]]
        assert sum(sizes) == plan.num_rows
        assert set(sizes[:-1]) == {24}
        assert len(sizes) == rows.num_batches(plan)
        assert sizes[-1] == plan.num_rows - 24 * (len(sizes) - 1)
    batches = [batch for own in by_rank for batch in own]
    ids = sample_ids_of(shards).tolist()
    wanted = Counter(
        {(ids[row], epoch + copy): 1 for row, n in enumerate(plan.times.tolist()) for copy in range(n)}
    )
    assert pairs_in(batches) == wanted
    assert plan.times.max() > 3, "the tail repeats"
    assert plan.times.min() == 0, "some of the head has no turn"
    for batch in batches:
        for sample, label, image in zip(batch.sample_ids, batch.labels, batch.images_BHWC, strict=True):
            assert truth[int(sample)] == (int(label), image.tobytes())


def test_view_indices_go_round_where_views_do_and_pairs_may_then_repeat(
    digits: tuple[ShardSet, tuple[int, ...]], reads: list[Piece]
) -> None:
    rows, free = rows_of(digits, cycle=2), rows_of(digits)
    found = pairs_in(list(rows.batches(5, 6)))
    folded: Counter[tuple[int, int]] = Counter()
    for (sample, view), times in pairs_in(list(free.batches(5, 6))).items():
        folded[sample, view % 2] += times
    assert found == folded
    assert max(found.values()) > 1
    assert reads


def test_images_that_an_epoch_does_not_take_are_not_held(digits: tuple[ShardSet, tuple[int, ...]]) -> None:
    shards, rows = digits[0], rows_of(digits)
    plan, held = rows.plan(0), 0
    for piece, repeats in zip(plan.pieces, plan.repeats, strict=True):
        assert repeats is not None
        table = reading.read_piece(shards, piece)
        taken = stream._taken(reading.block_arrays(table, shards.side), repeats, 0, None)
        assert len(taken.images) == len(set(repeats.rows.tolist()))
        assert len(taken) == len(repeats.rows)
        held += len(taken.images)
    assert held == (plan.times > 0).sum() < sum(piece.num_rows for piece in plan.pieces)


@pytest.mark.parametrize("rows_per_run", [1, 1000, 1 << 18])
def test_epochs_follow_each_other_without_a_gap_however_many_are_read_in_one_go(
    digits: tuple[ShardSet, tuple[int, ...]],
    reads: list[Piece],
    rows_per_run: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = [b.sample_ids.tolist() for e in range(2, 7) for b in rows_of(digits).batches(e, e + 1)]
    once, runs = list(reads), []
    monkeypatch.setattr(epoch_rows, "ROWS_PER_RUN", rows_per_run)
    read = stream.blocks_of
    monkeypatch.setattr(stream, "blocks_of", lambda *asked: runs.append(asked) or read(*asked))
    rows = rows_of(digits)
    reads.clear()
    together = [batch.sample_ids.tolist() for batch in rows.batches(2, 7)]
    assert together == apart
    assert reads == once
    assert len(together) == sum(rows.num_batches(rows.plan(epoch)) for epoch in range(2, 7))
    assert len(runs) == {1: 5, 1000: 3, 1 << 18: 1}[rows_per_run], "some 400 rows in an epoch"


@pytest.mark.parametrize("name", ["square_root", "class_balanced"])
def test_classes_come_as_often_as_the_sampler_says(
    digits: tuple[ShardSet, tuple[int, ...]], reads: list[Piece], name: Any
) -> None:
    rows, counts = rows_of(digits, sampler=SamplerConfig(name=name)), np.array(digits[1])
    seen = np.zeros(len(counts))
    for epoch in range(20):
        for batch in rows.batches(epoch, epoch + 1):
            seen += np.bincount(batch.labels, minlength=len(counts))
    q = expected_copies(digits[1], SAMPLERS[name].power)
    spread = np.sqrt(counts * (q % 1) * (1 - q % 1) * 20)
    assert (np.abs(seen - 20 * counts * q) <= 5 * spread + 1e-9).all()
    assert reads


def test_deferred_sampling_begins_at_its_epoch_and_is_plain_before(
    digits: tuple[ShardSet, tuple[int, ...]],
) -> None:
    plain = rows_of(digits, sampler=SamplerConfig())
    late = rows_of(digits, sampler=SamplerConfig(name="class_balanced", from_epoch=2))
    at_once = rows_of(digits)
    for epoch in range(4):
        other = plain if epoch < 2 else at_once
        assert late.plan(epoch).pieces == other.plan(epoch).pieces
        np.testing.assert_array_equal(late.plan(epoch).times, other.plan(epoch).times)
    assert at_once.plan(1).num_rows != at_once.plan(2).num_rows, "the length varies"
    assert {plain.plan(epoch).num_rows for epoch in range(4)} == {digits[0].num_rows}


@pytest.mark.parametrize("world", [1, 2])
def test_coverage_is_whole_for_what_was_planned_and_says_what_was_not_trained(
    digits: tuple[ShardSet, tuple[int, ...]], reads: list[Piece], world: int
) -> None:
    epoch, seen, left_out = 1, [], []
    for rank in range(world):
        rows = rows_of(digits, rank, world)
        plan = rows.plan(epoch)
        seen += [batch.sample_ids for batch in rows.batches(epoch, epoch + 1)]
        left_out = digits_ids(digits)[list(plan.left_out)].tolist()
    assert rows.coverage(plan, seen, CPU) == {
        "seen": int((plan.times > 0).sum()), "missed": 0, "doubled": 0,
        "left_out": len(left_out), "left_out_ids": sorted(left_out),
    }  # fmt: skip
    assert len(left_out) == (sum(map(len, seen)) + len(left_out)) % world
    assert rows.coverage(plan, seen[1:], CPU)["missed"] == len(seen[0])
    assert rows.coverage(plan, [*seen, seen[0]], CPU)["doubled"] == len(seen[0])
    assert reads


def digits_ids(digits: tuple[ShardSet, tuple[int, ...]]) -> np.ndarray:
    return sample_ids_of(digits[0])
