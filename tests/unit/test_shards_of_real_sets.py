"""Real sets become shards: the counts that were published or that the source's own size gives."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from krd_ray.data.shards import ShardOptions, write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.data.verify import verify_dataset
from krd_ray.maths.longtail import exponential_counts

SHARED_DATA = Path(os.environ.get("KRD_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_digits_end_to_end(tmp_path):
    manifest = write_shards(
        open_source(SourceSpec("digits")), tmp_path / "set", ShardOptions(imbalance_ratio=20)
    )
    assert manifest.splits["test"].class_counts == [30] * 10
    assert manifest.splits["val"].class_counts == [10] * 10
    assert manifest.warnings == []
    verify_dataset(tmp_path / "set", full=True)


def test_cifar100_lt_gives_the_published_split(tmp_path):
    folder = SHARED_DATA / "cifar100_lt"
    if not folder.is_dir():
        pytest.skip("CIFAR-100-LT is not here; set KRD_SHARED_DATA to the folder that holds cifar100_lt/")
    pq.write_table(pq.read_table(folder / "test.parquet").slice(0, 200), tmp_path / "some_test.parquet")
    source = open_source(
        SourceSpec(
            "parquet",
            path=folder / "train.parquet",
            test_path=tmp_path / "some_test.parquet",
            rank_column="rank_in_class",
        )
    )
    options = ShardOptions(imbalance_ratio=100, n_max=500, val_policy="left_out")
    manifest = write_shards(source, tmp_path / "set", options)
    assert manifest.splits["train"].num_rows == 10847
    assert manifest.splits["train"].class_counts == exponential_counts(100, 500, 100).tolist()
    assert manifest.group_sizes() == {"many": 35, "medium": 35, "few": 30}
    verify_dataset(tmp_path / "set", full=True)
