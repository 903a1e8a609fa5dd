"""Whole searches: one teacher for all trials, kills of driver and teacher, a trial that raises, what comes out."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from krd_ray.config_io import load_config
from tests.e2e.conftest import krd, start_krd, wait_for

pytestmark = pytest.mark.timeout(600)
EPOCHS, CYCLE = 4, 2

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


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def json_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def num_train(search: Path) -> int:
    rows: int = json_of(search / "dataset.json")["splits"]["train"]["num_rows"]
    return rows


@pytest.fixture
def search_config(distill_config: Callable[..., Path], tmp_path: Path) -> Path:
    """One tiny student, two views, four epochs; the search goes to tmp_path/run."""
    (tmp_path / "space.py").write_text(SPACE)
    train = {"epochs": EPOCHS, "checkpoint_every_epochs": EPOCHS, "lr": 1e-5, "progress_every_s": 0.1}
    return distill_config(
        [{"name": "only", "model": "digits_net_4"}], views={"cycle": CYCLE}, train=train, evaluate=True
    )


def teacher_pid(search: Path) -> int | None:
    path = search / "teacher/stats-0.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[0])["pid"] if lines else None


def ended(search: Path) -> list[dict[str, str]]:
    path = search / "trials.csv"
    return (
        [row for row in lines_of(path) if row["state"] in ("complete", "stopped", "failed")]
        if path.exists()
        else []
    )


def test_a_search_costs_one_teacher_whatever_dies_in_it(search_config: Path, tmp_path: Path) -> None:
    search, space = tmp_path / "run", tmp_path / "space.py"
    words = ["--trials", "4", "--at-once", "2", "--grace-epochs", "1", "--confirm-seeds", "0"]
    process = start_krd("tune", search_config, "--space", space, *words)
    wait_for(lambda: ended(search), process)
    os.kill(wait_for(lambda: teacher_pid(search), process), signal.SIGKILL)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output

    rows = {int(row["number"]): row for row in lines_of(search / "trials.csv")}
    assert sorted(rows) == [0, 1, 2, 3]
    assert rows[0]["baseline"] == "True"
    assert rows[1]["state"] == "failed"
    assert "the loss is not finite at epoch" in rows[1]["error"]
    others = [rows[number]["state"] for number in (0, 2, 3)]
    assert set(others) <= {"complete", "stopped"}, "the teacher's death fails no trial"

    ledger = json_of(search / "ledger.json")
    assert ledger["teacher"]["forwards"] == CYCLE * num_train(search), "one teacher for the whole search"
    assert ledger["teacher"]["restarts"] == 1
    assert ledger["driver_bytes"] == {"pixels": 0, "targets": 0}

    record = json_of(search / "search.json")
    best = load_config(search / "best.yaml")
    assert best.train.epochs == EPOCHS
    assert not record["best"]["baseline"]
    assert best.train.lr == record["best"]["settings"]["train.lr"]
    assert (search / "report/index.html").read_text().count("<figure>") >= 3
    assert re.search(r"4/4 trial \d", output)
    confirmed = json_of(search / f"confirm/{record['best']['number']}/ledger.json")
    assert confirmed["teacher"]["forwards"] == 0, "it reads the search's own store"
    assert "points for the best, with one seed, which has no spread: not to be told from chance" in output


def test_a_killed_search_goes_on_and_repeats_no_trial_that_had_ended(
    search_config: Path, tmp_path: Path
) -> None:
    search, space = tmp_path / "run", tmp_path / "space.py"
    space.write_text(SPACE.replace("trial.number == 1", "False"))
    words = ["--trials", "4", "--at-once", "2", "--no-prune", "--no-confirm"]
    process = start_krd("tune", search_config, "--space", space, *words)
    wait_for(lambda: ended(search), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for_workers(search)
    before = {row["number"]: row for row in ended(search)}
    done = krd("tune", "--resume", search)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["number"]: row for row in lines_of(search / "trials.csv")}
    for number, row in before.items():
        assert {key: rows[number][key] for key in row} == row
        starts = (search / f"trials/{number}/metrics.jsonl").read_text().count('"split": "start"')
        assert starts == 1, "a trial that had ended is not trained again"
    assert len(ended(search)) == 4, "the search is as long as it was to be"
    interrupted = [row for row in rows.values() if row["state"] == "interrupted"]
    drawn = [(row["baseline"], row["param loss.lrd.weight"]) for row in rows.values()]
    assert interrupted
    for row in interrupted:
        assert drawn.count((row["baseline"], row["param loss.lrd.weight"])) >= 2, (
            "what was running is tried again"
        )
    ledger = json_of(search / "ledger.json")
    assert ledger["teacher"]["forwards"] == CYCLE * num_train(search), "of both sessions together"
    assert yaml.safe_load((search / "best.yaml").read_text())["students"][0]["name"] == "only"


def wait_for_workers(search: Path) -> None:
    """Waits until the trials of a killed driver have ended: workers outlive it by a second or two."""
    deadline = time.monotonic() + 60
    pids = [
        json.loads(line)["pid"]
        for path in search.glob("trials/*/metrics.jsonl")
        for line in path.read_text().splitlines()
        if '"split": "start"' in line
    ]
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    ):
        assert time.monotonic() < deadline, "a worker of the killed search still runs"
        time.sleep(0.1)


def test_what_cannot_work_is_said_before_anything_starts(search_config: Path, tmp_path: Path) -> None:
    space = tmp_path / "wrong.py"
    space.write_text(SPACE.replace("loss.lrd.weight", "loss.lrd.wieght"))
    done = krd("tune", search_config, "--space", space)
    assert done.returncode == 1
    assert "loss.lrd.wieght: unknown setting; did you mean `weight`?" in done.stderr
    assert not (tmp_path / "run").exists()
