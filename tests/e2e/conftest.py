"""Answers what the whole-command tests share: digits shards and a teacher, made once by the commands themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

KRD = [sys.executable, "-m", "krd_ray.cli"]
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "OMP_NUM_THREADS": "1",
}
TIMEOUT_S = 240


def krd(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a `krd` command to its end and returns what it printed."""
    command = [*KRD, *map(str, words)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def start_krd(*words: str | Path) -> subprocess.Popen[str]:
    """Starts a `krd` command in a process group of its own."""
    return subprocess.Popen(
        [*KRD, *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Polls until the condition holds and returns its value; fails when the process ends or time runs out."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if process.poll() is not None:
            pytest.fail(f"the command ended with {process.returncode}: {process.communicate()[0]}")
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"nothing after {TIMEOUT_S} s: {process.communicate()[0]}")


def rows_of(run: Path, student: str, split: str) -> list[dict[str, Any]]:
    """The metric rows of one student and split, written so far."""
    path = run / "students" / student / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "shards"
    words = (
        "--imbalance-ratio 20 --n-max 120 --store raw --image-size 8 --rows-per-shard 128 --row-group-rows 64"
    )
    done = krd("shards", "digits", out, *words.split())
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def base(shards: Path) -> dict[str, Any]:
    """Settings that every run of these tests starts from."""
    return {
        "data": {"dir": str(shards)},
        "views": {"pad": 1, "flip": False},
        "train": {"batch_size": 64, "lr": 0.1, "epochs": 4},
        "ray": {"num_cpus": 2, "object_store_bytes": 128 << 20},
        "evaluate": False,
    }


@pytest.fixture(scope="session")
def teacher_weights(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    config = {
        **base,
        "name": "teacher",
        "run_dir": str(folder / "run"),
        "train": {**base["train"], "epochs": 20, "checkpoint_every_epochs": 20},
        "students": [{"name": "teacher", "model": "digits_net_32", "resources": {"num_cpus": 0.5}}],
    }
    (folder / "teacher.yaml").write_text(yaml.safe_dump(config))
    done = krd("teacher", folder / "teacher.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run/students/teacher/model.safetensors"


@pytest.fixture
def distill_config(base: dict[str, Any], teacher_weights: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a distillation config with the given students and settings over the base; run_dir is tmp_path/run."""

    def write(students: list[dict[str, Any]], **over: Any) -> Path:
        config = {
            **base,
            "name": "distilled",
            "run_dir": str(tmp_path / "run"),
            "teacher": {"weights": str(teacher_weights), "resources": {"num_cpus": 0.25}},
            "loss": {
                "classification": {"name": "balanced_softmax"},
                "rrd": {"weight": 1},
                "lrd": {"weight": 1},
            },
            "students": [{"resources": {"num_cpus": 0.25}, **student} for student in students],
        }
        for name, value in over.items():
            config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
