"""A search on the shared cluster: trials that fall behind, or whose process is killed, give everything back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from krd_ray.config_io import parse_config
from krd_ray.tune.search import new_search, run_search
from krd_ray.tune.search_dir import SearchOptions
from tests.ray_tier.conftest import Digits

pytestmark = pytest.mark.timeout(300)
EPOCHS = 8

# Every trial but the baseline learns nothing, slowly: one image a step.
SPACE = """
METRIC = "val/top1"
MODE = "max"


def space(trial):
    trial.suggest_float("loss.lrd.weight", 0.5, 2.0)
    return {"train.batch_size": 1, "train.lr": 1e-6}
"""


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def living_groups() -> list[Any]:
    groups = ray.util.placement_group_table().values()
    return [group for group in groups if group["state"] != "REMOVED"]


def kill_process_of(trial: Path) -> None:
    """Kills the process of a trial once its student trains; the cluster's processes are ours."""
    while not (trial / "metrics.jsonl").is_file():
        time.sleep(0.1)
    for process in psutil.Process().children(recursive=True):
        if "ImplicitFunc" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
def test_stopped_and_killed_trials_give_all_cpus_back(digits: Digits, weights: Path, tmp_path: Path) -> None:
    before, groups = free_cpus(), len(living_groups())
    (tmp_path / "space.py").write_text(SPACE)
    config = parse_config(
        {
            "name": "search",
            "run_dir": str(tmp_path / "search"),
            "data": {"dir": digits.raw.root},
            "views": {"pad": 1, "cycle": 1},
            "teacher": {"weights": str(weights), "resources": {"num_cpus": 0.25}},
            "loss": {"classification": {"name": "balanced_softmax"}, "lrd": {"weight": 1}},
            "train": {
                "epochs": EPOCHS,
                "batch_size": 32,
                "checkpoint_every_epochs": EPOCHS,
                "progress_every_s": 0.1,
            },
            "students": [{"name": "s", "model": "digits_net_8", "resources": {"num_cpus": 0.5}}],
        }
    )
    said: list[str] = []
    options = SearchOptions(trials=3, epochs=0, grace_epochs=1, at_once=1)
    search = new_search(config, tmp_path / "space.py", options, student=None, say=said.append)
    killer = threading.Thread(target=kill_process_of, args=(tmp_path / "search/trials/2",), daemon=True)
    killer.start()
    record = run_search(search, said.append)
    killer.join()
    assert record["counts"] == {"complete": 1, "stopped": 1, "failed": 1}
    assert record["best"]["baseline"]
    result = json.loads((tmp_path / "search/trials/1/result.json").read_text())
    assert result["status"] == "stopped"
    assert result["epochs_done"] < EPOCHS
    assert not (tmp_path / "search/trials/1/model.safetensors").exists()
    assert "the trial's own process died" in (tmp_path / "search/trials.csv").read_text()
    ledger = json.loads((tmp_path / "search/ledger.json").read_text())
    assert ledger["teacher"]["forwards"] == digits.raw.num_rows
    deadline = time.monotonic() + 20
    while (free_cpus() < before or len(living_groups()) > groups) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_cpus() >= before, "an earlier test's may have come back too"
    assert len(living_groups()) <= groups
