"""Answers whether shards, weights, run directories and target stores at a URI are what they are in a folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from krd_ray.config_io import parse_config
from krd_ray.data.manifest import Manifest
from krd_ray.data.plan import Piece
from krd_ray.data.reading import read_piece
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import ShardSet, labels_of, sample_ids_of
from krd_ray.data.shards import write_shards, write_shards_at
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.data.verify import verify_dataset
from krd_ray.errors import ConfigError, DataError, RunError, StorageError
from krd_ray.models.registry import build_model
from krd_ray.storage.places import Folder
from krd_ray.teacher.store_archive import fetch_store, publish_store
from krd_ray.teacher.stored import StoreReader
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.prepare import prepare
from krd_ray.train.run import resume_run, start_run
from krd_ray.train.rundir import open_run, write_json
from krd_ray.tune.search_dir import SearchDir
from tests.unit.run_builders import raw_run
from tests.unit.test_stored import HASH, IDS, WIDTH, spec_in, values_of, write

OPTIONS = ShardOptions(
    imbalance_ratio=10,
    n_max=40,
    val_per_class=2,
    store="raw",
    image_size=8,
    rows_per_shard=64,
    row_group_rows=32,
)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KRD_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder behind the URI; a bucket, for the code."""
    folder = tmp_path / "there"
    write_shards_at(open_source(SourceSpec(kind="digits")), f"file://{folder}", OPTIONS)
    return folder


def test_shards_at_a_uri_are_those_of_a_folder(there: Path, tmp_path: Path) -> None:
    manifest = write_shards(open_source(SourceSpec(kind="digits")), tmp_path / "here", OPTIONS)
    assert Manifest.load(f"file://{there}") == manifest
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()
    }
    assert verify_dataset(f"file://{there}", full=True) == manifest
    here, away = (ShardSet.open(place, manifest, "train") for place in (tmp_path / "here", f"file://{there}"))
    assert sample_ids_of(away).tolist() == sample_ids_of(here).tolist()
    assert labels_of(away).tolist() == labels_of(here).tolist()
    for chunk, rows in enumerate(here.chunk_rows):
        assert read_piece(away, Piece(chunk, 0, rows)) == read_piece(here, Piece(chunk, 0, rows))


def test_quick_check_of_shards_copies_none_of_them(there: Path, scratch: Path) -> None:
    verify_dataset(f"file://{there}", full=False)
    assert list(scratch.rglob("*.parquet")) == []
    verify_dataset(f"file://{there}", full=True)
    assert len(list(scratch.rglob("*.parquet"))) == len(list(there.glob("*.parquet")))


def test_shards_that_are_there_already_are_kept_others_refused_or_replaced(there: Path) -> None:
    place, source = f"file://{there}", open_source(SourceSpec(kind="digits"))
    before = {path.name: path.stat().st_mtime_ns for path in there.iterdir()}
    write_shards_at(source, place, OPTIONS)
    assert {path.name: path.stat().st_mtime_ns for path in there.iterdir()} == before
    other = replace(OPTIONS, rows_per_shard=256)
    with pytest.raises(DataError, match=f"^{place} already holds other shards"):
        write_shards_at(source, place, other)
    write_shards_at(source, place, other, overwrite=True)
    verify_dataset(place, full=True)
    assert len(list(there.glob("train-*"))) == 1


def test_shard_that_changed_at_its_place_is_refused_where_it_is_read(there: Path) -> None:
    manifest = verify_dataset(f"file://{there}", full=False)
    shards = ShardSet.open(f"file://{there}", manifest, "train")
    path = there / shards.files[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} has another checksum"):
        read_piece(shards, Piece(0, 0, 1))
    path.unlink()
    with pytest.raises(DataError, match=f"shard {path.name} is missing from file://{there}"):
        verify_dataset(f"file://{there}", full=False)
    with pytest.raises(StorageError, match=f"cannot read file://{path}"):
        read_piece(shards, Piece(0, 0, 1))


def test_no_shards_at_a_uri_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no dataset.json in file://{tmp_path}/nowhere"):
        Manifest.load(f"file://{tmp_path}/nowhere")


def test_run_is_prepared_from_uris_and_repeats_them(there: Path, tmp_path: Path) -> None:
    weights = f"file://{tmp_path}/bucket/t.safetensors"
    net = build_model("digits_net_4", num_classes=10, image_size=8, seed=0)
    save_weights(net.state_dict(), ModelCard("digits_net_4", 10, 8, (0, 0, 0), (1, 1, 1), ""), weights)
    loaded, card = load_model(weights, model=None, num_classes=10, image_size=8)
    assert card is not None
    assert all((value == net.state_dict()[name]).all() for name, value in loaded.state_dict().items())
    raw = raw_run(there, teacher={"weights": weights}, loss={"kd": {"weight": 1}})
    config = parse_config({**raw, "data": {"dir": f"file://{there}/"}})
    prepared = prepare(config).config
    assert prepared.data.dir == f"file://{there}"
    assert prepared.teacher is not None
    assert prepared.teacher.weights == weights
    (tmp_path / "bucket/t.safetensors").unlink()
    with pytest.raises(StorageError, match=r"t.safetensors does not exist"):
        prepare(config)


def test_run_directory_at_a_uri_is_recognised_as_taken(there: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/bucket/run"
    with open_run(place) as run:
        write_json(run.config, {})
    assert (tmp_path / "bucket/run/config.yaml").is_file()
    with pytest.raises(
        RunError, match=f"{place} holds a run already; continue it with `krd distill --resume {place}`"
    ):
        start_run(parse_config({**raw_run(there), "run_dir": place}))
    with pytest.raises(RunError, match=f"{place}-other is not a run directory"):
        resume_run(f"{place}-other")


def test_search_refuses_a_uri_and_makes_no_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"run_dir of a search is s3://bucket/search, but has to be on this machine",
    ):
        SearchDir(Path("s3://bucket/search").expanduser().resolve())
    assert not (tmp_path / "s3:").exists()


def test_store_that_does_not_persist_is_refused_at_a_uri(there: Path) -> None:
    teacher = {"weights": "t.safetensors", "spill_dir": "s3://bucket/store"}
    with pytest.raises(ConfigError, match=r"teacher.spill_dir is s3://bucket/store.*teacher.persist to true"):
        prepare(parse_config(raw_run(there, teacher=teacher, loss={"kd": {"weight": 1}})))


def test_store_at_a_uri_comes_back_on_another_node(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(spec_in(tmp_path), store_dir=f"file://{tmp_path}/bucket/store")
    fetch_store(spec, HASH, 0)  # nothing there yet
    write(spec, {0: IDS})
    publish_store(spec, HASH)
    monkeypatch.setenv("KRD_SCRATCH", str(tmp_path / "other-node"))
    read = StoreReader(spec, HASH, 0, IDS, WIDTH)
    read.require([0])
    assert (read(np.zeros(len(IDS), np.int64), IDS) == values_of(0, IDS)).all()
    write(spec, {1: IDS[:50]})
    publish_store(spec, HASH)

    monkeypatch.setenv("KRD_SCRATCH", str(scratch))  # the first node takes over what the other has added
    read = StoreReader(spec, HASH, 0, IDS, WIDTH)
    assert (read(np.ones(50, np.int64), IDS[:50]) == values_of(1, IDS[:50])).all()
    assert Folder.at(spec.store_dir).files().keys() == {
        f"archives/{next(scratch.rglob('replica-0-*.version')).stem}.tar"
    }


def test_store_on_a_node_is_not_replaced_by_the_archive_it_came_from(tmp_path: Path) -> None:
    spec = replace(spec_in(tmp_path), store_dir=f"file://{tmp_path}/bucket/store")
    write(spec, {0: IDS})
    publish_store(spec, HASH)
    write(spec, {1: IDS})  # by a teacher that was killed before it could publish
    fetch_store(spec, HASH, 0)
    StoreReader(spec, HASH, 0, IDS, WIDTH).require([0, 1])


def test_store_that_does_not_persist_stays_on_its_node(tmp_path: Path) -> None:
    spec = replace(spec_in(tmp_path), store_dir=f"file://{tmp_path}/bucket/store", persist=False)
    write(spec, {0: IDS})
    publish_store(spec, HASH)
    assert not (tmp_path / "bucket").exists()
    shutil.rmtree(tmp_path / "scratch")
    fetch_store(spec, HASH, 0)
