"""One light Ray cluster, digits shards and a quickly trained teacher for all tests of this tier."""
# ruff: noqa: E402 - the settings below are read when Ray and torch are imported

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

for _name, _value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_worker_maximum_startup_concurrency": "8",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import numpy as np
import pytest
import torch
from torch.nn import functional

from krd_ray.config import RayConfig, Resources, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.manifest import Manifest
from krd_ray.data.reading import cache_blocks
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.data.stream import eval_batches
from krd_ray.maths.rectify import Rectifier
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.models.registry import build_model
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.group import TeacherGroup
from krd_ray.teacher.ports import ActorPort, TeacherLink
from krd_ray.teacher.spec import TeacherSpec
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.cluster import connected
from krd_ray.train.worker_spec import WorkerSpec
from tests.ray_tier.student_runs import EPOCHS

NUM_CPUS = 4
OBJECT_STORE_BYTES = 256 << 20
TEACHER = "digits_net_16"
FRACTION = Resources(num_cpus=0.25)
NAMES = count()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of four logical CPUs, started as the package itself starts one."""
    folder = tempfile.mkdtemp(prefix="krd", dir="/tmp")  # sockets live in it: paths up to 107 bytes
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    try:
        with connected(RayConfig(num_cpus=NUM_CPUS, object_store_bytes=OBJECT_STORE_BYTES)):
            yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Digits:
    """The same long-tailed digits twice, as raw pixels and as PNG, and the manifest of the raw ones."""

    raw: ShardSet
    encoded: ShardSet
    val: ShardSet
    manifest: Manifest
    view: ViewSpec

    @property
    def class_counts(self) -> tuple[int, ...]:
        return tuple(self.manifest.splits["train"].class_counts)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """About 400 training images of 8 x 8 pixels in several shards of several row groups of uneven size."""
    root = tmp_path_factory.mktemp("shards")
    manifests = {}
    for store in ("raw", "encoded"):
        options = ShardOptions(
            imbalance_ratio=20,
            n_max=119,
            val_per_class=3,
            store="raw" if store == "raw" else "encoded",
            image_size=8,
            rows_per_shard=150,
            row_group_rows=32,
        )
        manifests[store] = write_shards(open_source(SourceSpec(kind="digits")), root / store, options)
    manifest = manifests["raw"]
    mean, std = (tuple(values) for values in (manifest.mean, manifest.std))
    return Digits(
        raw=ShardSet.open(root / "raw", manifest, "train"),
        encoded=ShardSet.open(root / "encoded", manifests["encoded"], "train"),
        val=ShardSet.open(root / "raw", manifest, "val"),
        manifest=manifest,
        view=ViewSpec("pad_crop", side=8, seed=7, mean=mean, std=std, pad=1, flip=True),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def cached(cluster: None, digits: Digits) -> ShardSet:  # noqa: ARG001 - it must run
    """The raw shards with their blocks in the object store."""
    return cache_blocks(digits.raw)


@pytest.fixture(scope="session")
def rows(cached: ShardSet) -> Batch:
    """All training rows in file order."""
    parts = list(eval_batches(cached, batch_size=64))
    return Batch(
        np.concatenate([part.sample_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.images_BHWC for part in parts]),
        np.concatenate([part.view_index for part in parts]),
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, digits: Digits, rows: Batch) -> Path:
    """A teacher after some hundred steps: right on most of its training images."""
    net = build_model(TEACHER, num_classes=10, image_size=8, seed=0).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(rows.labels)
    for step in range(150):
        chosen = draws.integers(0, len(rows), 64)
        view = train_view(
            torch.from_numpy(rows.images_BHWC[chosen]),
            torch.from_numpy(rows.sample_ids[chosen]),
            step,
            digits.view,
        )
        optimizer.zero_grad()
        functional.cross_entropy(net(view)[0], labels[chosen]).backward()
        optimizer.step()
    return save_card(net, digits, tmp_path_factory.mktemp("weights") / "teacher.safetensors")


def save_card(net: torch.nn.Module, digits: Digits, path: Path) -> Path:
    card = ModelCard(TEACHER, 10, 8, digits.view.mean, digits.view.std, digits.manifest.content_hash)
    save_weights(net.state_dict(), card, path)
    return path


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """A teacher that was never trained."""
    net = build_model(TEACHER, num_classes=10, image_size=8, seed=1)
    return save_card(net, digits, tmp_path_factory.mktemp("random") / "random.safetensors")


@pytest.fixture(scope="session")
def forward_here(digits: Digits, weights: Path) -> TeacherForward:
    """The same teacher in this process, in micro-batches of another size."""
    net, card = load_model(weights, model=None, num_classes=10, image_size=8)
    return TeacherForward(net, card, digits.view, device=torch.device("cpu"), bf16=False, micro_batch=24)


@dataclass(frozen=True)
class Teachers:
    """Starts teacher groups; what a test does not name is the same for all."""

    digits: Digits
    weights: Path
    shards: ShardSet

    def specs(self, folder: Path, num_replicas: int = 1, **changes: Any) -> list[TeacherSpec]:
        """One spec per replica; with the shards' cached blocks, so that requests travel without pixels."""
        (folder / "teacher").mkdir(parents=True, exist_ok=True)
        spec = TeacherSpec(
            weights=str(self.weights),
            model=None,
            view=self.digits.view,
            shards=self.shards,
            dataset_hash=self.digits.manifest.content_hash,
            class_counts=self.digits.class_counts,
            replica=0,
            num_replicas=num_replicas,
            micro_batch=16,
            queue_rows=256,
            memory_bytes=8 << 20,
            disk_bytes=8 << 20,
            persist=False,
            precision="fp32",
            compile="off",
            num_threads=1,
            device="cpu",
            store_dir=str(folder / "store"),
            run_dir=str(folder / "teacher"),
            calibration=str(folder / "teacher" / "calibration.safetensors"),
        )
        return [replace(spec, replica=k, **changes) for k in range(num_replicas)]

    def open(self, specs: Sequence[TeacherSpec]) -> TeacherGroup:
        """Processes only: neither calibrated nor tested."""
        return TeacherGroup(specs, FRACTION, num_callers=16, name=f"test-{next(NAMES)}")

    def start(self, specs: Sequence[TeacherSpec], *, min_accuracy: float = 0.5) -> tuple[TeacherGroup, str]:
        """A group ready to serve, and its hash."""
        group = self.open(specs)
        probe = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
        return group, group.start(self.shards, probe, min_accuracy=min_accuracy).teacher_hash

    def client(self, served: tuple[TeacherGroup, str], rectifier: Rectifier, **changes: Any) -> TeacherClient:
        """A student's side; it sends pixels only to replicas that have none."""
        group, teacher_hash = served
        has_pixels = group._specs[0].shards.blocks is not None
        ports = [ActorPort(replica, has_pixels=has_pixels) for replica in group.replicas]
        settings = {"in_flight": 3, "timeout_s": 60.0} | changes
        return TeacherClient(ports, teacher_hash, "tester", rectifier, **settings)


@pytest.fixture(scope="session")
def teachers(cached: ShardSet, digits: Digits, weights: Path) -> Teachers:
    return Teachers(digits, weights, cached)


@pytest.fixture(scope="session")
def served(
    teachers: Teachers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TeacherGroup, str]]:
    """One replica that the tests share; each takes its views from `new_view`."""
    group, teacher_hash = teachers.start(teachers.specs(tmp_path_factory.mktemp("served")))
    yield group, teacher_hash
    group.close()


@pytest.fixture(scope="session")
def served_without_blocks(
    teachers: Teachers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TeacherGroup, str]]:
    """The same teacher for a split that is not cached: requests carry references to pixels."""
    specs = teachers.specs(tmp_path_factory.mktemp("served"), shards=teachers.digits.raw)
    group, teacher_hash = teachers.start(specs)
    yield group, teacher_hash
    group.close()


@pytest.fixture(params=["served", "served_without_blocks"])
def either(request: pytest.FixtureRequest) -> tuple[TeacherGroup, str]:
    """The teacher in both ways in which pixels reach it."""
    served: tuple[TeacherGroup, str] = request.getfixturevalue(request.param)
    return served


@pytest.fixture(scope="session")
def new_view() -> Callable[[], int]:
    """A view index that no other test has asked for."""
    return count(100).__next__


@pytest.fixture
def spec(digits: Any, cached: ShardSet, served: Any, tmp_path: Path) -> WorkerSpec:
    """A small student that learns rectified logits and features from the served teacher."""
    group, teacher_hash = served
    return WorkerSpec(
        student="small",
        model="digits_net_4",
        train=TrainConfig(epochs=EPOCHS, batch_size=32, lr=0.05, precision="fp32", channels_last=False),
        loss=LossConfig.model_validate({"rrd": {"weight": 1.0}, "lrd": {"weight": 1.0}}),
        view=digits.view,
        cycle=None,
        train_shards=cached,
        val_shards=digits.val,
        class_counts=digits.class_counts,
        seed=5,
        shuffle_seed=3,
        window_rows=1000,
        folder=str(tmp_path / "small"),
        session=0,
        dataset_hash="0",
        num_threads=1,
        teacher=TeacherLink(
            "actors", teacher_hash, 64, 60.0, replicas=tuple(group.replicas), has_pixels=True
        ),
    )
