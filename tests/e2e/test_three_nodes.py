"""Three nodes: shards on one, the teacher on another, students on the third; and what `krd doctor` says of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from krd_ray.data.manifest import Manifest
from krd_ray.models.registry import build_model
from krd_ray.teacher.weights import ModelCard, save_weights
from tests.e2e.conftest import KRD, TIMEOUT_S, krd, rows_of
from tests.e2e.raylets import Raylets, raylets

SIDE, EPOCHS = 32, 3  # blocks of more than 100 KB: smaller ones do not go through the object store
STUDENTS = ("small", "pair")


@dataclass(frozen=True)
class Nodes:
    """A cluster whose nodes hold one thing each."""

    cluster: Raylets
    teacher: str
    students: str

    def krd(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*KRD, *map(str, words)],
            env=self.cluster.environment | {"COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Only the head has CPUs, so that shards are decoded there."""
    with raylets(num_cpus=2) as cluster:
        teacher = cluster.add(labels={"role": "teacher"})
        students = cluster.add(resources={"students": 1})
        yield Nodes(cluster, teacher, students)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("large") / "shards"
    words = "--imbalance-ratio 10 --n-max 120 --store raw --image-size 32 --rows-per-shard 256"
    done = krd("shards", "digits", out, *words.split(), "--row-group-rows", "256")
    assert done.returncode == 0, done.stderr
    return out, Manifest.load(out)


@pytest.fixture(scope="module")
def config(manifest: tuple[Path, Manifest], nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pins the teacher by label and the students by a resource of our own; the teacher need not be a good one."""
    folder, (shards, made) = tmp_path_factory.mktemp("run"), manifest
    net = build_model("digits_net_8", num_classes=10, image_size=SIDE, seed=0)
    card = ModelCard("digits_net_8", 10, SIDE, tuple(made.mean), tuple(made.std), made.content_hash)
    save_weights(net.state_dict(), card, folder / "teacher.safetensors")
    on_third = {"num_cpus": 0, "custom": {"students": 0.1}}
    raw = {
        "name": "three-nodes",
        "run_dir": str(folder / "run"),
        "data": {"dir": str(shards), "cache": "memory"},
        "teacher": {
            "weights": str(folder / "teacher.safetensors"),
            "min_accuracy": 0.0,
            "resources": {"num_cpus": 0, "node_labels": {"role": "teacher"}},
        },
        "loss": {"rrd": {"weight": 1}, "lrd": {"weight": 1}},
        "train": {"epochs": EPOCHS, "batch_size": 64},
        "students": [
            {"name": "small", "model": "digits_net_4", "resources": on_third},
            {
                "name": "pair",
                "model": "digits_net_4",
                "resources": on_third,
                "workers": 2,
                "strategy": "STRICT_PACK",
            },
        ],
        "ray": {"address": nodes.cluster.address},
        "evaluate": False,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


def test_each_part_runs_where_it_was_put_and_pixels_reach_a_node_once(
    nodes: Nodes, config: Path, manifest: tuple[Path, Manifest]
) -> None:
    before = nodes.cluster.received()
    done = nodes.krd("distill", config)
    assert done.returncode == 0, done.stdout + done.stderr
    after, run = nodes.cluster.received(), config.with_name("run")
    (replica,) = json.loads((run / "teacher/selftest.json").read_text())["replicas"]
    assert replica["node"] == nodes.teacher
    for student in STUDENTS:
        assert {row["node"] for row in rows_of(run, student, "start")} == {nodes.students}, student

    ledger: dict[str, Any] = json.loads((run / "ledger.json").read_text())
    made = manifest[1]
    train, val = (made.splits[name].num_rows for name in ("train", "val"))
    assert ledger["teacher"]["unique_views"] == EPOCHS * train
    assert ledger["forwards_per_unique_view"] == 1.0
    assert ledger["driver_bytes"] == {"pixels": 0, "targets": 0}

    # A store takes in what is made on its node and what comes from others. Nothing of size is made on these two, so
    # this bounds the pixels that crossed the network: all views of all students took each image once to each node.
    pixel_bytes, received = SIDE * SIDE * 3, {node: after[node] - before[node] for node in after}
    assert train * pixel_bytes <= received[nodes.teacher] < 1.05 * train * pixel_bytes
    assert train * pixel_bytes <= received[nodes.students] < 1.05 * (train + val) * pixel_bytes


def test_doctor_finds_nothing_wrong_with_good_nodes_and_all_that_is_with_a_bad_one(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    words = ("doctor", "--address", nodes.cluster.address)
    good = nodes.krd(*words, "--shared", tmp_path, "--config", config)
    assert good.returncode == 0, good.stdout + good.stderr
    assert ", 0 wrong" in good.stdout
    assert list(tmp_path.iterdir()) == []

    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(config.read_text().replace("role: teacher", "role: head"))
    bad = nodes.cluster.add(num_gpus=1, object_store_memory=80 << 20)  # no GPU, no room
    try:
        found = nodes.krd(*words, "--shared", "/proc", "--config", elsewhere)  # where nobody may write
    finally:
        nodes.cluster.remove(bad)
    assert found.returncode == 1
    wrong = [line for line in found.stdout.splitlines() if line.startswith("wrong: ")]
    assert any(bad[:8] in line and "Ray promises 1 GPU, torch sees 0" in line for line in wrong)
    assert any(bad[:8] in line and "the object store has 80 MiB" in line for line in wrong)
    (folder,) = [line for line in wrong if "a file there: " in line]
    assert all(node[:8] in folder for node in (nodes.cluster.head, nodes.teacher, nodes.students, bad))
    (place,) = [line for line in wrong if line.startswith("wrong: all nodes: ")]
    assert "teacher replica 0 needs a node labelled role=head and finds no place" in place
    assert "ray start --labels=role=head" in found.stdout
    assert "is labelled role=teacher" in found.stdout
