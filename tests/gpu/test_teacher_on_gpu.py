"""Answers whether a teacher on a GPU says the same however it is run, and whether a run on one card shares it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from krd_ray.config import RayConfig, RunConfig
from krd_ray.data.manifest import Manifest
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.errors import TeacherError
from krd_ray.maths.views import ViewSpec
from krd_ray.models.registry import build_model
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.recorded import Compile, record_forward
from krd_ray.train.cluster import connected
from krd_ray.train.run import start_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
VIEW = ViewSpec("pad_crop", 32, 0, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)
IMAGES = np.random.default_rng(0).integers(0, 256, (150, 32, 32, 3), np.uint8)
IDS = np.arange(150)


def forward_by(how: Compile, *, bf16: bool = False) -> TeacherForward:
    net = build_model("resnet20", num_classes=10, image_size=32, seed=0).eval().requires_grad_(False)
    cuda = torch.device("cuda")
    return TeacherForward(net, None, VIEW, device=cuda, bf16=bf16, micro_batch=64, compile=how)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_recorded_teacher_says_the_same_to_the_bit(bf16: bool) -> None:
    plain, recorded = forward_by("off", bf16=bf16), forward_by("cuda_graph", bf16=bf16)
    first = recorded(IMAGES, IDS, np.zeros(150, np.int64))
    kept = first.copy()
    second = recorded(IMAGES, IDS, np.ones(150, np.int64))
    assert np.array_equal(first, kept)  # a later replay leaves earlier answers alone
    assert np.array_equal(first, plain(IMAGES, IDS, np.zeros(150, np.int64)))
    assert np.array_equal(second, plain(IMAGES, IDS, np.ones(150, np.int64)))
    assert not np.array_equal(first, second)


def test_a_compiled_teacher_says_nearly_the_same() -> None:
    views = np.zeros(150, np.int64)
    found, expected = forward_by("inductor")(IMAGES, IDS, views), forward_by("off")(IMAGES, IDS, views)
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=1e-2, atol=1e-2)


def test_a_network_that_asks_the_gpu_in_between_is_refused() -> None:
    def asks(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return view[:, 0, 0, :10] * float(view.sum()), view[:, 0, 0, :4]

    with pytest.raises(TeacherError, match=r"set teacher\.compile to off"):
        record_forward(asks, (4, 3, 32, 32), torch.device("cuda"), "cuda_graph")


@pytest.mark.parametrize(("placement", "per_process"), [("actors", 1), ("actors", 2), ("in_process", 2)])
def test_teacher_and_students_share_one_card(tmp_path: Path, placement: str, per_process: int) -> None:
    options = ShardOptions(store="raw", image_size=32, val_per_class=2)
    write_shards(open_source(SourceSpec(kind="digits")), tmp_path / "shards", options)
    small = {"epochs": 2, "batch_size": 128, "lr": 0.05}
    data = {"dir": str(tmp_path / "shards")}
    share = {"num_cpus": 1, "num_gpus": 0.3}
    with connected(RayConfig(num_cpus=4)):
        alone = RunConfig.model_validate(
            {
                "name": "teacher",
                "run_dir": str(tmp_path / "teacher"),
                "data": data,
                "train": small,
                "students": [{"name": "teacher", "model": "resnet20", "resources": share}],
            }
        )
        assert not start_run(alone).failed
        taught = RunConfig.model_validate(
            {
                "name": "students",
                "run_dir": str(tmp_path / "students"),
                "data": data,
                "train": small,
                "loss": {"rrd": {"weight": 1.0}, "lrd": {"weight": 1.0}},
                "teacher": {
                    "weights": str(tmp_path / "teacher/students/teacher/model.safetensors"),
                    "resources": share,
                    "min_accuracy": 0.0,
                    "placement": placement,
                },
                "students_per_process": per_process,
                "students": [
                    {"name": f"student{k}", "model": "resnet8", "resources": share} for k in range(2)
                ],
            }
        )
        outcome = start_run(taught)
    assert not outcome.failed
    ledger = json.loads(outcome.run.ledger.read_text())
    assert ledger["forwards_per_unique_view"] == 1.0
    assert ledger["teacher"]["forwards"] == 2 * Manifest.load(tmp_path / "shards").splits["train"].num_rows
    assert {each["missed"] + each["doubled"] for each in ledger["students"].values()} == {0}
    written = (outcome.run.root / "config.yaml").read_text()
    assert "compile: cuda_graph" in written
    assert "precision: bf16" in written
