"""Every kind of source lists and streams what lies on disk, and says what is wrong with it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krd_ray.data.images import decode_batch, decode_image, encode_png, fit_array
from krd_ray.data.source_parquet import ParquetSource
from krd_ray.data.sources import SOURCES, SourceSpec, list_sources, open_source
from krd_ray.errors import ConfigError, DataError


def png(value: int, side: int = 4) -> bytes:
    pixels = np.full((side, side, 3), value, dtype=np.uint8)
    pixels[0, 0] = 255 - value
    return encode_png(pixels)


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))


def everything(source) -> np.ndarray:
    return np.ones(len(source.train_labels()), dtype=bool)


def write_parquet(path: Path, images, labels, *, names=("image", "label"), group=2, **extra) -> Path:
    columns = {names[0]: images, names[1]: pa.array(labels)}
    columns |= {name: pa.array(values) for name, values in extra.items()}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_registry_knows_six_kinds_and_each_says_what_it_reads():
    assert list_sources() == ["digits", "cifar10", "cifar100", "folder", "list", "parquet"]
    assert all(record.source for record in SOURCES.values())


def test_unknown_missing_and_foreign_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        open_source(SourceSpec("parket"))
    with pytest.raises(ConfigError, match="'list' needs train_list"):
        open_source(SourceSpec("list", path=tmp_path))
    with pytest.raises(ConfigError, match="rank_column means nothing to source 'folder'"):
        open_source(SourceSpec("folder", path=tmp_path, rank_column="rank"))


def test_digits_are_the_real_images_in_rgb():
    from sklearn.datasets import load_digits

    source = open_source(SourceSpec("digits"))
    samples = list(source.iter_train(everything(source)))
    real = load_digits()
    assert len(samples) == 1797
    assert len(source.test_labels()) == 0
    assert [sample.label for sample in samples] == real.target.tolist()
    for sample in samples[::300]:
        grey = real.images[sample.index] / 16
        assert sample.image.shape == (8, 8, 3)
        assert np.abs(sample.image / 255 - grey[..., None]).max() < 0.5 / 255 + 1e-12


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_folder_in_torchvision_format(kind, tmp_path, monkeypatch):
    from krd_ray.models.torchvision_import import import_torchvision

    fn = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[kind]
    dataset = getattr(import_torchvision().datasets, fn)
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    rng = np.random.RandomState(0)
    key = "labels" if kind == "cifar10" else "fine_labels"
    for name, _ in dataset.train_list + dataset.test_list:
        entry = {"data": rng.randint(0, 256, (2, 3072), dtype=np.uint8), key: [1, 0]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names_key = dataset.meta["key"]
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({names_key: ["cat", "dog"]}))
    monkeypatch.setattr(f"torchvision.datasets.cifar.{fn}._check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = open_source(SourceSpec(kind, path=tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.train_labels().tolist() == [1, 0] * len(dataset.train_list)
    assert source.test_labels().tolist() == [1, 0]
    (sample,) = source.iter_train(np.arange(len(source.train_labels())) == 1)
    with (folder / dataset.train_list[0][0]).open("rb") as file:
        rows = pickle.load(file)["data"]  # noqa: S301 - written above
    assert (sample.image == rows[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_missing_cifar_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"cifar10 cannot be read.*allow the download"):
        open_source(SourceSpec("cifar10", path=tmp_path))


def test_folder_streams_only_what_is_selected_with_bytes_untouched(tmp_path):
    for name, value in (("dog/b.png", 20), ("dog/deep/a.PNG", 30), ("cat/x.png", 10), ("cat/notes.txt", 0)):
        put(tmp_path / name, value)
    source = open_source(SourceSpec("folder", path=tmp_path))
    assert source.classes == ["cat", "dog"]
    assert source.train_labels().tolist() == [0, 1, 1]
    (sample,) = source.iter_train(np.array([False, False, True]))
    assert (sample.index, sample.label, sample.image) == (2, 1, png(30))
    assert sample.where == "dog/deep/a.PNG"
    assert source.describe() == {"kind": "folder", "path": tmp_path.name}


@pytest.mark.parametrize("test_path", [None, "val", "absolute"])
def test_folder_with_train_and_val_inside(tmp_path, test_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/dog/c.png"):
        put(tmp_path / name, 7)
    given = {None: None, "val": Path("val"), "absolute": tmp_path / "val"}[test_path]
    source = open_source(SourceSpec("folder", path=tmp_path, test_path=given))
    assert source.classes == ["cat", "dog"]
    assert source.train_labels().tolist() == [0, 1]
    assert [sample.label for sample in source.iter_test()] == source.test_labels().tolist() == [1]


def test_folder_with_only_train_inside_has_no_class_called_train(tmp_path):
    put(tmp_path / "train/cat/a.png", 1)
    assert open_source(SourceSpec("folder", path=tmp_path)).classes == ["cat"]


def test_folder_problems_are_named(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_source(SourceSpec("folder", path=tmp_path / "nowhere"))
    put(tmp_path / "train/cat/a.png", 1)
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(DataError, match=r"class 1 \('dog'\) has no image"):
        open_source(SourceSpec("folder", path=tmp_path / "train"))
    put(tmp_path / "train/dog/a.png", 1)
    put(tmp_path / "test/fox/a.png", 1)
    with pytest.raises(DataError, match="has class 'fox'"):
        open_source(SourceSpec("folder", path=tmp_path, test_path=Path("test")))
    with pytest.raises(DataError, match="lies inside the training folder"):
        open_source(SourceSpec("folder", path=tmp_path / "train", test_path=tmp_path / "train/dog"))


def test_list_reads_labels_paths_with_spaces_and_folder_names(tmp_path):
    put(tmp_path / "img/cat/a b.png", 10)
    put(tmp_path / "img/dog/c.png", 20)
    (tmp_path / "train.txt").write_text("img/dog/c.png 1\nimg/cat/a b.png\t0\n\n")
    (tmp_path / "test.txt").write_text("img/dog/c.png 1\n")
    spec = SourceSpec(
        "list", path=tmp_path, train_list=tmp_path / "train.txt", test_list=tmp_path / "test.txt"
    )
    source = open_source(spec)
    assert source.classes == ["cat", "dog"]
    assert [s.image for s in source.iter_train(everything(source))] == [png(20), png(10)]
    assert [s.label for s in source.iter_test()] == [1]
    assert source.describe()["train_list"] == "train.txt"


def test_list_names_stay_numbers_when_folders_do_not_match_labels(tmp_path):
    (tmp_path / "train.txt").write_text("all/a.png 0\nall/b.png 1\n")
    source = open_source(SourceSpec("list", path=tmp_path, train_list=tmp_path / "train.txt"))
    assert source.classes == ["0", "1"]


def test_list_problems_name_file_and_line(tmp_path):
    train = tmp_path / "train.txt"
    spec = SourceSpec("list", path=tmp_path, train_list=train)
    for text in ("a.png 0\nb.png -1\n", "a.png 0\nb.png\n", "a.png 0\nb.png cat\n"):
        train.write_text(text)
        with pytest.raises(DataError, match=r"train\.txt, line 2: expected 'path label'"):
            open_source(spec)
    train.write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        open_source(spec)
    train.write_text("a.png 0\nb.png 1\n")
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"row 1: label 1 is outside 0\.\.0"):
        open_source(SourceSpec("list", path=tmp_path, train_list=train, class_names=tmp_path / "names.txt"))


def test_list_with_a_missing_file_yields_no_image_and_the_reason(tmp_path):
    (tmp_path / "train.txt").write_text("gone.png 0\n")
    source = open_source(SourceSpec("list", path=tmp_path, train_list=tmp_path / "train.txt"))
    (sample,) = source.iter_train(np.array([True]))
    assert sample.image is None
    assert sample.where == "gone.png (No such file or directory)"


def test_parquet_flat_form_with_ranks_over_several_files(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "1.parquet", [png(4), png(5)], [1, 0], rank=[1, 1])
    write_parquet(folder / "0.parquet", [png(1), png(2), png(3)], [0, 1, 1], rank=[0, 0, 2])
    source = open_source(SourceSpec("parquet", path=folder, rank_column="rank"))
    assert source.train_labels().tolist() == [0, 1, 1, 1, 0]
    assert source.train_ranks().tolist() == [0, 0, 2, 1, 1]
    picked = list(source.iter_train(np.array([False, True, False, False, True])))
    assert [(s.index, s.label, s.image) for s in picked] == [(1, 1, png(2)), (4, 0, png(5))]


def test_parquet_hugging_face_form_with_its_class_names(tmp_path):
    images = pa.array(
        [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"img": images, "fine_label": pa.array([1, 0, 0])})
    features = {"fine_label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    stored = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(stored), tmp_path / "x.parquet")
    source = open_source(
        SourceSpec("parquet", path=tmp_path / "x.parquet", image_column="img", label_column="fine_label")
    )
    assert source.classes == ["cat", "dog"]
    samples = list(source.iter_train(everything(source)))
    assert [s.image for s in samples] == [png(1), None, None]
    assert "source row 1 (no image bytes)" in samples[1].where


def test_parquet_reads_only_row_groups_that_hold_a_selected_row(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [png(i) for i in range(8)], [0, 1] * 4)
    source = open_source(SourceSpec("parquet", path=path))
    read = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        read.extend(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert isinstance(source, ParquetSource)
    assert [s.index for s in source.iter_train(np.arange(8) == 5)] == [5]
    assert read == [2]


def test_parquet_problems_are_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [png(1), png(2)], [0, 1])
    with pytest.raises(DataError, match=r"no column 'img', its columns are \['image', 'label'\]"):
        open_source(SourceSpec("parquet", path=path, image_column="img"))
    with pytest.raises(DataError, match="column 'label' is int64, expected image bytes"):
        open_source(SourceSpec("parquet", path=path, image_column="label"))
    with pytest.raises(DataError, match="column 'image' is binary, expected integers"):
        open_source(SourceSpec("parquet", path=path, label_column="image"))
    write_parquet(path, [png(1), png(2)], [0, None])
    with pytest.raises(DataError, match="row 1: column 'label' is null"):
        open_source(SourceSpec("parquet", path=path))
    write_parquet(path, [png(1), png(2)], [0, -1])
    with pytest.raises(DataError, match="row 1: label -1 is outside"):
        open_source(SourceSpec("parquet", path=path))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="no readable Parquet file"):
        open_source(SourceSpec("parquet", path=path))


def test_decode_keeps_lossless_pixels_and_crops_the_centre():
    pixels = np.random.RandomState(0).randint(0, 256, (6, 10, 3), dtype=np.uint8)
    data = encode_png(pixels)
    assert (decode_image(data, None, where="x") == pixels).all()
    assert (decode_image(data, 6, where="x") == pixels[:, 2:8]).all()
    assert (fit_array(pixels, 6, where="x") == pixels[:, 2:8]).all()
    assert (decode_batch([data, data], 6, where=str)[1] == pixels[:, 2:8]).all()


def test_decode_resizes_with_antialiasing_over_the_centre_square():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = board[..., None]
    small = decode_image(encode_png(wide), 8, where="x").astype(int)
    assert small.shape == (8, 8, 3)
    assert np.abs(small[1:-1, 1:-1] - 127).max() < 6, "a checkerboard averages to grey"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_decode_turns_every_8_bit_mode_into_rgb(mode):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5), (200, 200, 200)).convert(mode).save(buffer, "TIFF")
    assert decode_image(buffer.getvalue(), 5, where="x").shape == (5, 5, 3)


def test_decode_names_what_it_cannot_read(monkeypatch):
    whole = png(9, side=32)
    for data in (b"", b"no image", whole[: len(whole) // 2]):
        with pytest.raises(DataError, match=r"unreadable image at shard 3, row 4"):
            decode_image(data, 8, where="shard 3, row 4")
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(buffer, "PNG")
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        decode_image(buffer.getvalue(), 4, where="x")
    monkeypatch.setattr("krd_ray.data.images.MAX_PIXELS", 100)
    with pytest.raises(DataError, match="image too large at x: 32x32 pixels"):
        decode_image(whole, 8, where="x")
