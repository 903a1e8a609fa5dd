"""One whole search in which a trial fails, the teacher and then the driver are killed, and which is resumed: what is
repeated, what is counted, what comes out. And what is refused before anything starts."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from krd_ray.config_io import load_config
from tests.e2e.conftest import krd, start_krd, wait_for

pytestmark = pytest.mark.timeout(600)
EPOCHS, CYCLE, TRIALS = 4, 2, 4

# The config learns next to nothing, the second trial's loss explodes.
SPACE = """
METRIC = "val/balanced"
MODE = "max"
BASELINE = True


def space(trial):
    trial.suggest_float("loss.lrd.weight", 0.01, 4.0, log=True)
    trial.suggest_float("train.lr", 0.05, 0.2)
    if trial.number == 1:
        return {"train.lr": 1e30, "train.momentum": 0.0, "train.nesterov": False}
"""


def trials_of(search: Path, *states: str) -> dict[str, dict[str, str]]:
    """Rows of trials.csv by number, of some states."""
    path = search / "trials.csv"
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["number"]: row for row in csv.DictReader(file) if not states or row["state"] in states}


def ended(search: Path) -> dict[str, dict[str, str]]:
    return trials_of(search, "complete", "stopped", "failed")


def json_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def starts_of(search: Path) -> list[dict[str, Any]]:
    """What the workers of all trials wrote first."""
    lines = [line for path in search.glob("trials/*/metrics.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if '"split": "start"' in line]


def wait_for_workers(search: Path) -> None:
    """Waits until the workers of a killed driver have ended: they outlive it by a second or two."""
    deadline = time.monotonic() + 60
    for pid in [row["pid"] for row in starts_of(search)]:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a worker of the killed search still runs"
            time.sleep(0.1)


@dataclass(frozen=True)
class Searched:
    """The search's folder, the trials that had ended when its driver was killed, and what the second one printed."""

    folder: Path
    before: dict[str, dict[str, str]]
    printed: str

    @property
    def record(self) -> dict[str, Any]:
        return json_of(self.folder / "search.json")

    @property
    def num_train(self) -> int:
        rows: int = json_of(self.folder / "dataset.json")["splits"]["train"]["num_rows"]
        return rows


@pytest.fixture(scope="module")
def config(base: dict[str, Any], teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    content = {
        **base,
        "name": "searched",
        "run_dir": str(folder / "run"),
        "views": {**base["views"], "cycle": CYCLE},
        "train": {**base["train"], "epochs": EPOCHS, "checkpoint_every_epochs": EPOCHS, "lr": 1e-5},
        "teacher": {"weights": str(teacher_weights), "resources": {"num_cpus": 0.25}},
        "loss": {"classification": {"name": "balanced_softmax"}, "rrd": {"weight": 1}, "lrd": {"weight": 1}},
        "students": [{"name": "only", "model": "digits_net_4", "resources": {"num_cpus": 0.25}}],
        "evaluate": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    (folder / "space.py").write_text(SPACE)
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def searched(config: Path) -> Searched:
    """kill -9 of the teacher after the first trial that ended, of the driver after the second, when the teacher is
    back; then `--resume`."""
    folder, space = config.with_name("run"), config.with_name("space.py")
    words = ["--trials", str(TRIALS), "--at-once", "2", "--grace-epochs", "1", "--confirm-seeds", "0"]
    process = start_krd("tune", config, "--space", space, *words)
    wait_for(lambda: ended(folder), process)
    first = json.loads((folder / "teacher/stats-0.jsonl").read_text().splitlines()[0])
    os.kill(first["pid"], signal.SIGKILL)
    stats = folder / "teacher/stats-0.jsonl"
    wait_for(lambda: len(ended(folder)) >= 2 and stats.read_text().count('"event": "start"') == 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for_workers(folder)
    before = ended(folder)
    done = krd("tune", "--resume", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Searched(folder, before, done.stdout)


def test_trials_that_had_ended_are_not_repeated_and_the_search_is_as_long_as_it_was_to_be(
    searched: Searched,
) -> None:
    rows = trials_of(searched.folder)
    assert 2 <= len(searched.before) < TRIALS
    for number, row in searched.before.items():
        assert {key: rows[number][key] for key in row} == row
        metrics = (searched.folder / f"trials/{number}/metrics.jsonl").read_text()
        assert metrics.count('"split": "start"') == 1
    assert len(ended(searched.folder)) == TRIALS
    assert re.search(rf"{TRIALS}/{TRIALS} trial \d", searched.printed)


def test_what_the_dead_driver_left_running_is_tried_again(searched: Searched) -> None:
    rows = trials_of(searched.folder)
    interrupted = trials_of(searched.folder, "interrupted")
    assert "died with their driver and run again" in searched.printed
    drawn = [(row["baseline"], row["param loss.lrd.weight"]) for row in rows.values()]
    assert interrupted
    for row in interrupted.values():
        assert drawn.count((row["baseline"], row["param loss.lrd.weight"])) >= 2


def test_whole_search_costs_one_teacher_whatever_died_in_it(searched: Searched) -> None:
    ledger = json_of(searched.folder / "ledger.json")
    assert ledger["teacher"]["forwards"] == CYCLE * searched.num_train
    assert ledger["forwards_per_unique_view"] == 1.0
    assert ledger["teacher"]["restarts"] == 1
    assert ledger["driver_bytes"] == {"pixels": 0, "targets": 0}
    shared = ledger["search"]
    assert shared["forwards_saved"] == shared["forwards_one_teacher_per_trial"] - shared["forwards"] > 0


def test_only_the_trial_whose_loss_explodes_fails(searched: Searched) -> None:
    rows = ended(searched.folder)
    assert [number for number, row in rows.items() if row["state"] == "failed"] == ["1"]
    assert "the loss is not finite at epoch" in rows["1"]["error"]
    baseline = [
        row for row in trials_of(searched.folder, "complete", "stopped").values() if row["baseline"] == "True"
    ]
    assert len(baseline) == 1


def test_best_is_a_config_and_is_confirmed_from_the_searchs_own_store(searched: Searched) -> None:
    best, folder = searched.record["best"], searched.folder
    assert not best["baseline"]
    config = load_config(folder / "best.yaml")
    assert config.train.lr == best["settings"]["train.lr"]
    assert config.train.epochs == EPOCHS
    confirm = folder / f"confirm/{best['number']}"
    assert json_of(confirm / "ledger.json")["teacher"]["forwards"] == 0
    assert set(json_of(confirm / "evaluation.json")["models"]) == {"teacher", "baseline.s0", "best.s0"}
    assert "with one seed, which has no spread: not to be told from chance" in searched.printed
    page = (folder / "report/index.html").read_text()
    assert page.count("<figure>") >= 3
    assert "not to be told from chance" in page


def test_what_cannot_work_is_said_before_anything_starts(config: Path, tmp_path: Path) -> None:
    space = tmp_path / "wrong.py"
    space.write_text(SPACE.replace("loss.lrd.weight", "loss.lrd.wieght"))
    done = krd("tune", config, "--space", space, "--set", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "loss.lrd.wieght: unknown setting; did you mean `weight`?" in done.stderr
    assert not (tmp_path / "run").exists()
