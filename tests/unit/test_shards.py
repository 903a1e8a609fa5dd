"""Writing shards: right rows, right order of randomness, bounded memory, the same bytes each time."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krd_ray.data import shards as shards_module
from krd_ray.data.images import decode_image, encode_png
from krd_ray.data.manifest import MANIFEST_FILE, Manifest
from krd_ray.data.shard_spill import Spill
from krd_ray.data.shards import PARTIAL_FOLDER, ShardOptions, write_shards
from krd_ray.data.source_contract import RawSample
from krd_ray.data.verify import verify_dataset
from krd_ray.errors import ConfigError, DataError
from krd_ray.maths.longtail import exponential_counts

SMALL = ShardOptions(
    imbalance_ratio=4, val_per_class=3, test_per_class=4, rows_per_shard=20, row_group_rows=8
)


@dataclass
class MadeSource:
    """Images made on demand: pixel values name the index, so that any mix-up shows; `bad` ones are broken."""

    per_class: int = 40
    classes: list[str] = field(default_factory=lambda: ["cat", "dog", "fox"])
    num_test: int = 0
    side: int = 4
    bad: frozenset[int] = frozenset()
    ranks: np.ndarray | None = None

    def describe(self) -> dict[str, str | int]:
        return {"kind": "made"}

    def train_labels(self) -> np.ndarray:
        return np.arange(self.per_class * len(self.classes)) % len(self.classes)

    def train_ranks(self) -> np.ndarray | None:
        return self.ranks

    def test_labels(self) -> np.ndarray:
        return np.arange(self.num_test) % len(self.classes)

    def pixels(self, index: int) -> np.ndarray:
        return np.random.RandomState(index).randint(0, 256, (self.side, self.side, 3), dtype=np.uint8)

    def iter_train(self, selected: np.ndarray) -> Iterator[RawSample]:
        for index in np.flatnonzero(selected).tolist():
            image: bytes | np.ndarray = b"broken" if index in self.bad else self.pixels(index)
            yield RawSample(index, index % len(self.classes), image, f"made {index}")

    def iter_test(self) -> Iterator[RawSample]:
        offset = len(self.train_labels())
        for index in range(self.num_test):
            image = encode_png(self.pixels(offset + index))
            yield RawSample(index, index % len(self.classes), image, f"made test {index}")


def rows(root: Path, split: str) -> list[dict]:
    files = [shard.file for shard in Manifest.load(root).splits[split].shards]
    return pa.concat_tables([pq.read_table(root / file) for file in files]).to_pylist()


def snapshot(root: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in root.iterdir()}


@pytest.mark.parametrize("num_test", [0, 12])
def test_every_row_holds_its_own_image_label_and_id(tmp_path, num_test):
    source = MadeSource(num_test=num_test)
    manifest = write_shards(source, tmp_path / "set", SMALL)
    seen: list[int] = []
    for split, record in manifest.splits.items():
        written = rows(tmp_path / "set", split)
        assert len(written) == record.num_rows == sum(record.class_counts)
        for row in written:
            assert (decode_image(row["image"], None, where="x") == source.pixels(row["sample_id"])).all()
            expected = row["sample_id"] if row["sample_id"] < 120 else row["sample_id"] - 120
            assert row["label"] == expected % 3
        seen += [row["sample_id"] for row in written]
    assert len(set(seen)) == len(seen), "no image in two splits"
    test_ids = {row["sample_id"] for row in rows(tmp_path / "set", "test")}
    assert test_ids == set(range(120, 132)) if num_test else all(i < 120 for i in test_ids)
    assert manifest.splits["test"].class_counts == [4, 4, 4]
    verify_dataset(tmp_path / "set", full=True)


def test_training_counts_follow_the_profile(tmp_path):
    manifest = write_shards(
        MadeSource(num_test=12), tmp_path / "set", dataclasses.replace(SMALL, val_policy="left_out")
    )
    assert manifest.splits["train"].class_counts == exponential_counts(3, 40, 4).tolist()
    assert manifest.splits["val"].class_counts == [0, 3, 3]
    assert manifest.warnings == [
        "fewer validation images than val_per_class, in 1 of 3 classes: 0 'cat' (0 of 3)"
    ]
    assert manifest.long_tail.model_dump() == {
        "profile": "exponential",
        "imbalance_ratio": 4.0,
        "n_max": 40,
        "seed": 0,
        "class_order": "index",
        "val_policy": "left_out",
        "val_per_class": 3,
    }


def test_raw_shards_hold_resized_pixels_of_fixed_size(tmp_path):
    source = MadeSource(side=6)
    options = dataclasses.replace(SMALL, store="raw", image_size=4)
    manifest = write_shards(source, tmp_path / "set", options)
    assert manifest.image.model_dump() == {"store": "raw", "height": 4, "width": 4, "channels": 3}
    schema = pq.read_schema(tmp_path / "set" / "train-00000.parquet")
    assert schema.field("image").type == pa.binary(48)
    assert schema.field("sample_id").type == pa.int64()
    assert schema.field("label").type == pa.int32()
    for row in rows(tmp_path / "set", "train")[:5]:
        expected = decode_image(encode_png(source.pixels(row["sample_id"])), 4, where="x")
        assert row["image"] == expected.tobytes()


def test_source_bytes_stay_untouched_in_encoded_shards(tmp_path):
    write_shards(MadeSource(num_test=12), tmp_path / "set", SMALL)
    source = MadeSource(num_test=12)
    expected = {120 + sample.index: sample.image for sample in source.iter_test()}
    assert {row["sample_id"]: row["image"] for row in rows(tmp_path / "set", "test")} == expected


def test_shards_are_even_and_row_groups_as_asked(tmp_path):
    manifest = write_shards(
        MadeSource(num_test=12), tmp_path / "set", dataclasses.replace(SMALL, imbalance_ratio=None)
    )
    shards = manifest.splits["train"].shards
    sizes = [shard.num_rows for shard in shards]
    assert len(sizes) == -(-sum(sizes) // 20)
    assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        metadata = pq.read_metadata(tmp_path / "set" / shard.file)
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert groups == shard.row_groups
        assert set(groups[:-1]) <= {8}
        assert metadata.row_group(0).column(2).compression == "UNCOMPRESSED"


def test_order_is_shuffled_across_the_whole_split(tmp_path):
    options = ShardOptions(val_per_class=0, rows_per_shard=100, store="raw")
    write_shards(MadeSource(per_class=200, num_test=3, side=1), tmp_path / "set", options)
    ids = np.array([row["sample_id"] for row in rows(tmp_path / "set", "train")])
    assert sorted(ids) == list(range(600))
    shard_means = ids.reshape(6, 100).mean(axis=1)
    assert np.abs(shard_means - 299.5).max() < 4 * 173 / 10, "each shard samples the whole range"
    assert abs(np.corrcoef(ids, np.arange(600))[0, 1]) < 0.15


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path):
    manifest = write_shards(MadeSource(), tmp_path / "set", SMALL)
    images = [decode_image(row["image"], None, where="x") for row in rows(tmp_path / "set", "train")]
    flat = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(manifest.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, flat.std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("store", ["encoded", "raw"])
def test_two_runs_give_the_same_bytes(tmp_path, store):
    options = dataclasses.replace(SMALL, store=store)
    for name in ("a", "b"):
        write_shards(MadeSource(num_test=12), tmp_path / name, options)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert MANIFEST_FILE in snapshot(tmp_path / "a")


def test_small_buffers_do_not_change_the_bytes(tmp_path, monkeypatch):
    write_shards(MadeSource(), tmp_path / "a", SMALL)
    monkeypatch.setattr(shards_module, "BUFFER_BYTES", 1000)
    write_shards(MadeSource(), tmp_path / "b", SMALL)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_sample_ids_and_test_split_do_not_depend_on_the_long_tail(tmp_path):
    write_shards(MadeSource(), tmp_path / "flat", dataclasses.replace(SMALL, imbalance_ratio=1))
    write_shards(MadeSource(), tmp_path / "steep", dataclasses.replace(SMALL, imbalance_ratio=8, seed=5))
    ids = [{row["sample_id"] for row in rows(tmp_path / name, "test")} for name in ("flat", "steep")]
    assert ids[0] == ids[1]
    steep = {row["sample_id"] for split in ("train", "val") for row in rows(tmp_path / "steep", split)}
    flat = {row["sample_id"] for split in ("train", "val") for row in rows(tmp_path / "flat", split)}
    assert steep < flat


def test_ranks_are_respected_when_the_test_split_is_held_out(tmp_path):
    ranks = np.arange(120) // 3
    manifest = write_shards(
        MadeSource(ranks=ranks), tmp_path / "set", dataclasses.replace(SMALL, val_per_class=0)
    )
    assert manifest.splits["train"].class_counts == exponential_counts(3, 36, 4).tolist()
    tested = {row["sample_id"] for row in rows(tmp_path / "set", "test")}
    tail = [i for i in range(2, 120, 3) if i not in tested][:9]
    assert sorted(r["sample_id"] for r in rows(tmp_path / "set", "train") if r["label"] == 2) == tail
    assert "val" not in manifest.splits


def test_too_large_n_max_is_clipped_and_recorded(tmp_path):
    options = dataclasses.replace(SMALL, n_max=100, val_per_class=0)
    manifest = write_shards(MadeSource(num_test=12), tmp_path / "set", options)
    assert manifest.splits["train"].class_counts == [40, 40, 25]
    assert manifest.warnings == [
        "fewer images than the long-tail profile asks for, all of them kept, in 2 of 3 classes: "
        "0 'cat' (40 of 100), 1 'dog' (40 of 50)"
    ]


def test_class_without_images_is_named(tmp_path):
    class Gap(MadeSource):
        def train_labels(self) -> np.ndarray:
            return np.where(super().train_labels() == 1, 0, super().train_labels())

    with pytest.raises(DataError, match=r"class 1 \('dog'\) has no training image in the source"):
        write_shards(Gap(), tmp_path / "set", SMALL)


def test_bad_image_stops_or_is_skipped_and_counted(tmp_path):
    source = MadeSource(num_test=12, bad=frozenset({0, 3, 7}))
    options = dataclasses.replace(SMALL, imbalance_ratio=None, val_per_class=0)
    with pytest.raises(DataError, match="unreadable image at made 0"):
        write_shards(source, tmp_path / "set", options)
    assert not (tmp_path / "set" / MANIFEST_FILE).exists()
    options = dataclasses.replace(options, on_bad_sample="skip")
    manifest = write_shards(source, tmp_path / "set", options)
    assert manifest.num_skipped == 3
    assert manifest.splits["train"].class_counts == [38, 39, 40]
    assert manifest.warnings[0].startswith(
        "3 unreadable images were skipped; the first: unreadable image at made 0"
    )
    assert {0, 3, 7}.isdisjoint(row["sample_id"] for row in rows(tmp_path / "set", "train"))
    verify_dataset(tmp_path / "set", full=True)


def test_class_emptied_by_skipping_is_named(tmp_path):
    source = MadeSource(num_test=12, bad=frozenset(range(1, 120, 3)))
    options = dataclasses.replace(SMALL, on_bad_sample="skip")
    with pytest.raises(DataError, match=r"class 1 \('dog'\) has no training image left after skipping"):
        write_shards(source, tmp_path / "set", options)


def test_shard_whose_rows_are_all_bad_leaves_no_gap_in_the_names(tmp_path):
    whole = write_shards(MadeSource(num_test=12), tmp_path / "whole", SMALL)
    first = pq.read_table(tmp_path / "whole" / "train-00000.parquet").column("sample_id").to_pylist()
    source = MadeSource(num_test=12, bad=frozenset(first))
    options = dataclasses.replace(SMALL, on_bad_sample="skip")
    manifest = write_shards(source, tmp_path / "set", options)
    files = [shard.file for shard in manifest.splits["train"].shards]
    assert len(files) == len(whole.splits["train"].shards) - 1
    assert files[0] == "train-00000.parquet"
    verify_dataset(tmp_path / "set", full=True)


def test_mixed_sizes_need_an_image_size(tmp_path):
    class Mixed(MadeSource):
        def pixels(self, index: int) -> np.ndarray:
            return np.resize(super().pixels(index), (4, 4 + index % 2, 3))

    with pytest.raises(DataError, match="without image_size all images must have one square size"):
        write_shards(Mixed(), tmp_path / "set", SMALL)
    manifest = write_shards(Mixed(), tmp_path / "set", dataclasses.replace(SMALL, image_size=3))
    assert (manifest.image.height, manifest.image.width) == (3, 3)


def test_one_colour_cannot_be_normalised(tmp_path):
    class Black(MadeSource):
        def pixels(self, index: int) -> np.ndarray:
            return np.zeros_like(super().pixels(index))

    with pytest.raises(DataError, match="the red channel has one value in all training images"):
        write_shards(Black(), tmp_path / "set", SMALL)


def test_same_request_is_reused_after_verification(tmp_path):
    first = write_shards(MadeSource(), tmp_path / "set", SMALL)
    before = {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "set").iterdir()}
    assert write_shards(MadeSource(), tmp_path / "set", SMALL) == first
    assert {entry.name: entry.stat().st_mtime_ns for entry in (tmp_path / "set").iterdir()} == before
    (tmp_path / "set" / "train-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing"):
        write_shards(MadeSource(), tmp_path / "set", SMALL)


def test_different_request_is_refused_unless_overwritten(tmp_path):
    out = tmp_path / "set"
    write_shards(MadeSource(), out, SMALL)
    (out / "notes.txt").write_text("mine")
    other = dataclasses.replace(SMALL, seed=1)
    with pytest.raises(DataError, match=r"holds other shards \(seed 0 there, 1 now\)"):
        write_shards(MadeSource(), out, other)
    with pytest.raises(DataError, match=r"labels_sha256 .*num_train_rows 120 there, 150 now"):
        write_shards(MadeSource(per_class=50), out, SMALL)
    bigger = dataclasses.replace(other, rows_per_shard=1000)
    manifest = write_shards(MadeSource(), out, bigger, overwrite=True)
    expected = {shard.file for split in manifest.splits.values() for shard in split.shards}
    assert {entry.name for entry in out.iterdir()} == expected | {"notes.txt", MANIFEST_FILE}


def test_failed_plan_leaves_the_earlier_result_alone(tmp_path):
    write_shards(MadeSource(), tmp_path / "set", SMALL)
    before = snapshot(tmp_path / "set")
    with pytest.raises(DataError, match="test_per_class"):
        write_shards(
            MadeSource(), tmp_path / "set", dataclasses.replace(SMALL, test_per_class=40), overwrite=True
        )
    assert snapshot(tmp_path / "set") == before


def test_foreign_folder_is_refused_and_an_interrupted_write_starts_over(tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    (out / "thesis.docx").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(it holds 'thesis.docx'\)"):
        write_shards(MadeSource(), out, SMALL)
    (out / "thesis.docx").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_shards(MadeSource(), out, SMALL)
    assert (out / PARTIAL_FOLDER).is_dir()
    write_shards(MadeSource(), out, SMALL)
    assert not (out / PARTIAL_FOLDER).exists()
    verify_dataset(out, full=True)


def test_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_: Spill) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spill, "flush", full)
    with pytest.raises(DataError, match=r"cannot write shards to .*No space left on device; free space"):
        write_shards(MadeSource(), tmp_path / "set", SMALL)


def test_memory_does_not_grow_with_the_size_of_the_set(tmp_path, monkeypatch):
    buffer_bytes, image_bytes = 1 << 17, 32 * 32 * 3
    monkeypatch.setattr(shards_module, "BUFFER_BYTES", buffer_bytes)
    buffered: list[int] = []
    original = Spill.flush

    def spy(self: Spill) -> None:
        buffered.append(self.peak_bytes)
        original(self)

    monkeypatch.setattr(Spill, "flush", spy)
    options = ShardOptions(val_per_class=0, store="raw", rows_per_shard=60, row_group_rows=20)

    def peak_bytes(per_class: int) -> int:
        source = MadeSource(per_class=per_class, side=32, num_test=3)
        tracemalloc.start()
        write_shards(source, tmp_path / str(per_class), options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(20)  # what is imported on first use stays out of the comparison
    growth = peak_bytes(900) - peak_bytes(300)  # far apart: a peak of one run moves by tens of kB
    assert len(buffered) > 20
    assert max(buffered) < buffer_bytes + image_bytes + 1000, "buffers are written out when full"
    assert growth < 0.1 * (900 - 300) * 3 * image_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": "jpeg"}, "store must be one of encoded, raw"),
        ({"rows_per_shard": 0}, "rows_per_shard must be >= 1"),
        ({"image_size": 0}, "image_size must be >= 1"),
        ({"seed": -1}, "seed must be in"),
        ({"val_policy": "random"}, "val_policy must be one of"),
    ],
)
def test_options_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ShardOptions(**settings)
