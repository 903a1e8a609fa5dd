"""Bad input as a user gives it: each is refused before training with what happened, where, and what to do."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from krd_ray.cli import main
from krd_ray.models.registry import build_model
from tests.e2e.conftest import krd

SMALL = [{"name": "small", "model": "digits_net_4"}]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `krd` in this process, which must exit with 1, and returns what it said."""

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["krd", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == 1, said
        assert said.startswith("error: ")
        return said

    return run


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_unknown_setting_names_the_nearest_valid_one(
    refused: Callable[..., str], distill_config: Callable[..., Path]
) -> None:
    said = refused("distill", distill_config(SMALL, loss={"lrd": {"temprature": 2}}))
    assert "loss.lrd.temprature: unknown setting; did you mean `temperature`?" in said


def test_set_with_a_typo_or_a_wrong_value_names_the_dotted_path(
    refused: Callable[..., str], distill_config: Callable[..., Path]
) -> None:
    path = distill_config(SMALL)
    assert "did you mean `batch_size`?" in refused("distill", path, "--set", "train.batchsize=3")
    assert "loss.lrd.temperature: " in refused("distill", path, "--set", "loss.lrd.temperature=-1")


def test_missing_config_and_missing_dataset_are_named(
    refused: Callable[..., str], distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert "none.yaml does not exist" in refused("distill", tmp_path / "none.yaml")
    said = refused("distill", distill_config(SMALL, data={"dir": str(tmp_path / "nowhere")}))
    assert "nowhere" in said
    assert "krd shards" in said


def test_truncated_shard_is_named_before_training(
    refused: Callable[..., str], distill_config: Callable[..., Path], own_shards: Path
) -> None:
    shard = own_shards / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    said = refused("distill", distill_config(SMALL, data={"dir": str(own_shards)}))
    assert "train-00001.parquet" in said
    assert "krd shards" in said


def test_label_out_of_range_is_named_with_shard_row_and_id(
    refused: Callable[..., str], distill_config: Callable[..., Path], own_shards: Path
) -> None:
    path = own_shards / "train-00000.parquet"
    table = pq.read_table(path)
    labels = table["label"].to_numpy().copy()
    labels[7] = 99
    sample_id = table["sample_id"][7].as_py()
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels, pa.int32()))
    pq.write_table(table, path, row_group_size=64, compression="none", write_statistics=False)
    _bless(own_shards, path)
    said = refused("distill", distill_config(SMALL, data={"dir": str(own_shards)}))
    assert "train-00000.parquet" in said
    assert "99" in said
    assert "row 7" in said
    assert str(sample_id) in said


def test_unreadable_image_is_named_by_krd_shards(refused: Callable[..., str], tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(b"not an image")
    said = refused(
        "shards", "folder", tmp_path / "out", "--path", tmp_path / "images", "--test-per-class", "1"
    )
    assert ".png" in said


def test_unknown_model_and_student_without_its_teacher_are_refused(
    refused: Callable[..., str], distill_config: Callable[..., Path]
) -> None:
    said = refused("distill", distill_config([{"name": "small", "model": "resnet9"}]))
    assert "resnet9" in said
    assert "resnet8" in said
    said = refused("distill", distill_config(SMALL), "--set", "teacher=null")
    assert "needs soft targets, but teacher is null" in said


def test_teacher_weights_missing_or_pickled_code_are_refused_and_not_run(
    refused: Callable[..., str], distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = distill_config(SMALL)
    assert "does not exist" in refused(
        "distill", path, "--set", f"teacher.weights={tmp_path / 'no.safetensors'}"
    )

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "attacked",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"weight": Attack()}))
    assert "only tensors are loaded" in refused(
        "distill", path, "--set", f"teacher.weights={tmp_path / 'evil.pt'}"
    )
    assert not (tmp_path / "attacked").exists()


def test_a_used_run_directory_is_refused(
    refused: Callable[..., str], distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: other\n")
    assert f"krd distill --resume {tmp_path / 'run'}" in refused("distill", distill_config(SMALL))


def test_more_than_the_cluster_has_is_refused_at_once_with_the_sums(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    done = krd("distill", distill_config([{**SMALL[0], "workers": 3, "resources": {"num_cpus": 1}}]))
    assert done.returncode == 1
    assert "student small worker" in done.stderr
    assert "needs 1 CPU" in done.stderr
    assert "the cluster has 2 CPU" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_knows_nothing_or_other_classes_is_refused_by_the_self_test(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    for name, classes in (("random", 10), ("other", 7)):
        net = build_model("digits_net_8", num_classes=classes, image_size=8, seed=1)
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    path = distill_config(SMALL)
    settings = ("--set", "teacher.model=digits_net_8", "--set")
    done = krd("distill", path, *settings, f"teacher.weights={tmp_path / 'random.pt'}")
    assert done.returncode == 1
    assert "self-test: the teacher is right on" in done.stderr
    run_dir = ("--set", f"run_dir={tmp_path / 'second'}")
    done = krd("distill", path, *settings, f"teacher.weights={tmp_path / 'other.pt'}", *run_dir)
    assert done.returncode == 1
    assert "of another shape" in done.stderr
    assert "number of classes" in done.stderr


def _bless(root: Path, shard: Path) -> None:
    """Makes dataset.json agree with a shard that was changed, so that only its content can give it away."""
    import hashlib

    manifest = json.loads((root / "dataset.json").read_text())
    for record in manifest["splits"]["train"]["shards"]:
        if record["file"] == shard.name:
            record["num_bytes"] = shard.stat().st_size
            record["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
            groups = pq.ParquetFile(shard).metadata
            record["row_groups"] = [groups.row_group(k).num_rows for k in range(groups.num_row_groups)]
    (root / "dataset.json").write_text(json.dumps(manifest))
    assert np.sum(record["row_groups"]) > 0
