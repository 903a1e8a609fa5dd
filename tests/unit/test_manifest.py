"""The manifest refuses what contradicts itself; verification names what is wrong in which file and row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krd_ray.data.manifest import MANIFEST_FILE, Manifest
from krd_ray.data.shards import ShardOptions, write_shards
from krd_ray.data.source_arrays import ArraySource
from krd_ray.data.verify import verify_dataset
from krd_ray.errors import DataError

OPTIONS = ShardOptions(val_per_class=2, test_per_class=3, rows_per_shard=15, row_group_rows=6)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 20 tiny images: train 45 rows in 3 shards, val 6, test 9."""
    images = np.random.RandomState(0).randint(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    source = ArraySource("tiny", ["cat", "dog", "fox"], images, labels, images[:0], labels[:0])
    write_shards(source, tmp_path / "set", OPTIONS)
    return tmp_path / "set"


def edit_manifest(root: Path, change: Callable[[dict], None]) -> None:
    path = root / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_shard(root: Path, file: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a shard's rows and let the manifest believe it: size and checksum are brought up to date."""
    table = change(pq.read_table(root / file))
    pq.write_table(table, root / file, row_group_size=OPTIONS.row_group_rows)
    data = (root / file).read_bytes()

    def update(content: dict) -> None:
        for split in content["splits"].values():
            for shard in split["shards"]:
                if shard["file"] == file:
                    shard |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(root, update)


def with_value(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, column, pa.array(values, type=table.schema.field(column).type))


def test_saved_manifest_loads_equal_and_leaves_no_partial_file(root):
    manifest = Manifest.load(root)
    manifest.save(root)
    assert Manifest.load(root) == manifest
    assert [entry.name for entry in root.iterdir() if entry.name.startswith(".")] == []


def test_group_sizes_follow_the_training_counts(root):
    manifest = Manifest.load(root)
    assert manifest.splits["train"].class_counts == [15, 15, 15]
    assert manifest.group_sizes() == {"many": 0, "medium": 0, "few": 3}


def test_content_hash_follows_shards_and_preprocessing_only(root):
    manifest = Manifest.load(root)
    split = manifest.splits["test"]
    shard = split.shards[0].model_copy(update={"sha256": "0" * 64})
    changed = {**manifest.splits, "test": split.model_copy(update={"shards": [shard]})}
    assert manifest.model_copy(update={"splits": changed}).content_hash != manifest.content_hash
    assert manifest.model_copy(update={"mean": [0.1, 0.2, 0.3]}).content_hash != manifest.content_hash
    assert manifest.model_copy(update={"warnings": ["x"]}).content_hash == manifest.content_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), r"colour: Extra inputs"),
        (lambda c: c.update(format="krd-shards/2"), r"format: Input should be 'krd-shards/1'"),
        (lambda c: c.update(num_classes=4), r"num_classes is 4 but classes has 3"),
        (lambda c: c.update(num_skipped="0"), r"num_skipped: Input should be a valid integer"),
        (lambda c: c.update(std=[0.1, 0.1, 0.0]), r"std\.2: Input should be greater than 0"),
        (lambda c: c["splits"].pop("train"), r"splits must be train and perhaps val and test"),
        (lambda c: c["splits"]["val"].update(num_rows=7), r"splits\.val: .*class_counts add up to 6"),
        (lambda c: c["splits"]["val"]["class_counts"].append(0), r"splits\.val\.class_counts has 4 of 3"),
        (lambda c: c["splits"]["val"]["shards"][0].update(file="../x.parquet"), r"shards\.0\.file"),
        (lambda c: c["splits"]["val"]["shards"][0].update(file="train-00000.parquet"), r"share one file"),
        (lambda c: c["splits"]["val"]["shards"][0].update(row_groups=[5]), r"row_groups .* add up to 5"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(root, change, message):
    edit_manifest(root, change)
    with pytest.raises(DataError, match=message):
        Manifest.load(root)


def test_missing_and_broken_manifests_say_what_to_do(root, tmp_path):
    with pytest.raises(DataError, match=r"no dataset\.json in .*krd shards"):
        Manifest.load(tmp_path / "nowhere")
    (root / MANIFEST_FILE).write_text("{")
    with pytest.raises(DataError, match=r"not a valid krd-shards/1 manifest.*Invalid JSON"):
        Manifest.load(root)


@pytest.mark.parametrize("full", [False, True])
def test_untouched_shards_verify(root, full):
    assert verify_dataset(root, full=full) == Manifest.load(root)


@pytest.mark.parametrize("full", [False, True])
def test_missing_shard_is_named(root, full):
    (root / "val-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"shard val-00000\.parquet is missing"):
        verify_dataset(root, full=full)


def test_truncated_shard_is_named_with_both_sizes(root):
    path = root / "train-00001.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"train-00001\.parquet has 100 bytes, the manifest says {size}"):
        verify_dataset(root, full=False)


def test_unreadable_footer_of_the_right_size_is_named(root):
    path = root / "train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-50] + bytes(50))
    with pytest.raises(DataError, match=r"train-00001\.parquet has no readable Parquet footer"):
        verify_dataset(root, full=False)


def test_missing_column_is_named(root):
    rewrite_shard(root, "test-00000.parquet", lambda table: table.drop_columns(["label"]))
    with pytest.raises(DataError, match=r"test-00000\.parquet has no column 'label', only"):
        verify_dataset(root, full=False)


def test_wrong_column_type_is_named(root):
    def widen(table: pa.Table) -> pa.Table:
        return table.set_column(1, "label", table.column("label").cast(pa.int64()))

    rewrite_shard(root, "test-00000.parquet", widen)
    with pytest.raises(DataError, match=r"column 'label' is int64, the manifest asks for int32"):
        verify_dataset(root, full=False)


def test_missing_rows_are_counted(root):
    rewrite_shard(root, "test-00000.parquet", lambda table: table.slice(0, 8))
    with pytest.raises(DataError, match=r"has 8 rows in 2 row groups, the manifest says 9 in 2"):
        verify_dataset(root, full=False)


def test_label_out_of_range_names_shard_row_and_id(root):
    sample_id = pq.read_table(root / "train-00002.parquet").column("sample_id")[7].as_py()
    rewrite_shard(root, "train-00002.parquet", lambda table: with_value(table, "label", 7, 3))
    verify_dataset(root, full=False)
    message = rf"shard train-00002\.parquet, row 7, sample_id {sample_id}: label 3 is outside 0\.\.2"
    with pytest.raises(DataError, match=message):
        verify_dataset(root, full=True)


@pytest.mark.parametrize("value", [None, b""])
def test_empty_image_names_shard_row_and_id(root, value):
    sample_id = pq.read_table(root / "train-00002.parquet").column("sample_id")[8].as_py()
    rewrite_shard(root, "train-00002.parquet", lambda table: with_value(table, "image", 8, value))
    message = rf"shard train-00002\.parquet, row 8, sample_id {sample_id}: image is empty"
    with pytest.raises(DataError, match=message):
        verify_dataset(root, full=True)


def test_duplicate_ids_name_both_places(root):
    sample_id = pq.read_table(root / "train-00000.parquet").column("sample_id")[3].as_py()
    rewrite_shard(root, "val-00000.parquet", lambda table: with_value(table, "sample_id", 2, sample_id))
    message = (
        rf"sample_id {sample_id} appears twice: in shard train-00000\.parquet, row 3 "
        r"and in shard val-00000\.parquet, row 2"
    )
    with pytest.raises(DataError, match=message):
        verify_dataset(root, full=True)


def test_relabelled_row_changes_the_class_counts(root):
    label = pq.read_table(root / "val-00000.parquet").column("label")[0].as_py()
    rewrite_shard(root, "val-00000.parquet", lambda table: with_value(table, "label", 0, (label + 1) % 3))
    with pytest.raises(DataError, match=r"split val: class \d \('\w+'\) has \d images in the shards"):
        verify_dataset(root, full=True)


def test_empty_training_class_is_named(root):
    def empty(content: dict) -> None:
        content["splits"]["train"]["class_counts"] = [15, 30, 0]

    edit_manifest(root, empty)
    with pytest.raises(DataError, match=r"class 2 \('fox'\) has no training image"):
        verify_dataset(root, full=False)


def test_changed_pixels_are_found_by_the_checksum(root):
    path = root / "train-00000.parquet"
    data = path.read_bytes()
    image = pq.read_table(path).column("image")[0].as_py()
    at = data.index(image) + len(image) - 20
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    verify_dataset(root, full=False)
    with pytest.raises(DataError, match=r"train-00000\.parquet has another checksum"):
        verify_dataset(root, full=True)
