"""Answers on what faults are tried: shards, a trained teacher, the config of a small distillation, its environment.

Does not start a run (`running` does).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from krd_ray.config import merge
from krd_ray.errors import KrdError

KRD = [sys.executable, "-m", "krd_ray.cli"]
EPOCHS = 24
MARK = "KRD_FAULTS_RUN"  # every process of a run inherits it, and is known by it
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # nothing but this machine's loopback is used
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}
# 160 rows of 16 x 16 x 3 bytes: above the 100 KB below which Ray would keep a block out of the object store.
SHARDS = "--imbalance-ratio 10 --store raw --image-size 16 --rows-per-shard 320 --row-group-rows 160"
SHARE = {"num_cpus": 0.25}
LEARNING: dict[str, Any] = {
    "views": {"pad": 2, "flip": False},
    "train": {"batch_size": 32, "lr": 0.05, "epochs": EPOCHS, "progress_every_s": 0.5},
    "ray": {"num_cpus": 2, "object_store_bytes": 128 << 20},
    "evaluate": False,
}
STUDENTS: dict[str, list[dict[str, Any]]] = {
    "two students": [
        {"name": "hit", "model": "digits_net_4", "resources": SHARE},
        {"name": "spared", "model": "digits_net_8", "resources": SHARE},
    ],
    "two workers": [{"name": "hit", "model": "digits_net_4", "workers": 2, "resources": SHARE}],
}


@dataclass(frozen=True)
class Files:
    """What all runs share."""

    shards: Path
    teacher: Path

    @classmethod
    def prepare(cls, root: Path) -> Files:
        """Writes shards and trains the teacher with krd_ray's own commands, if they are not there."""
        files = cls(root / "shards", root / "teacher/students/teacher/model.safetensors")
        if not (files.shards / "dataset.json").is_file():
            _run("shards", "digits", files.shards, *SHARDS.split())
        if not files.teacher.is_file():
            student = {"name": "teacher", "model": "digits_net_32", "resources": {"num_cpus": 0.5}}
            config = merge(
                LEARNING | {"data": {"dir": str(files.shards)}},
                {"name": "teacher", "run_dir": str(root / "teacher"), "students": [student]},
            )
            path = write_config(root / "teacher.yaml", merge(config, {"train": {"epochs": 12}}))
            _run("teacher", path)
        return files

    def config(self, setting: str, run_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
        """A distillation of rectified logits and features, its store on disk, with changes laid over it."""
        config = LEARNING | {
            "name": "faults",
            "run_dir": str(run_dir),
            "data": {"dir": str(self.shards)},
            "teacher": {
                "weights": str(self.teacher),
                "resources": SHARE,
                "persist": True,
                "disk_bytes": 16 << 20,
            },
            "loss": {"rrd": {"weight": 1}, "lrd": {"weight": 1}},
            "students": STUDENTS[setting],
        }
        return merge(config, changes)


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Writes a config file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _run(*words: str | Path) -> None:
    command = [*KRD, *map(str, words)]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KrdError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
