"""Whole runs in which something dies or goes wrong: what survives, what is counted, what is said."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import krd, rows_of, start_krd, wait_for

pytestmark = pytest.mark.timeout(600)
EPOCHS = 24
LONG = {"epochs": EPOCHS, "val_every_epochs": 10, "checkpoint_every_epochs": 1}


def _covered(run: Path, student: str) -> list[tuple[int, int, int]]:
    """(epoch, missed, doubled) of every epoch a student completed; the last attempt of an epoch wins."""
    last = {
        row["epoch"]: (row["epoch"], row["missed"], row["doubled"])
        for row in rows_of(run, student, "coverage")
    }
    return [last[epoch] for epoch in sorted(last)]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _wait_for_end(pid: int) -> None:
    """Waits until a process that is not our child runs no more; nobody may be there to reap it."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.1)


def _ledger(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "ledger.json").read_text())
    return content


def test_kill_9_of_the_teacher_and_of_a_student_worker_loses_nothing(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    students = [{"name": "hit", "model": "digits_net_4"}, {"name": "spared", "model": "digits_net_8"}]
    run = tmp_path / "run"
    process = start_krd("distill", distill_config(students, train=LONG, teacher={"persist": True}))
    wait_for(lambda: len(rows_of(run, "spared", "coverage")) >= 2, process)
    started = json.loads((run / "teacher/stats-0.jsonl").read_text().splitlines()[0])
    os.kill(started["pid"], signal.SIGKILL)
    wait_for(lambda: len(rows_of(run, "hit", "coverage")) >= 4, process)
    os.kill(rows_of(run, "hit", "start")[0]["pid"], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    for name in ("hit", "spared"):
        assert _covered(run, name) == [(epoch, 0, 0) for epoch in range(EPOCHS)]
    ledger = _ledger(run)
    assert ledger["teacher"]["restarts"] == 1
    assert ledger["students"]["hit"]["restarts"] == 1
    assert ledger["students"]["spared"]["restarts"] == 0
    assert ledger["forwards_per_unique_view"] == 1.0  # the store on disk outlived the process
    assert ledger["driver_bytes"] == {"pixels": 0, "targets": 0}


def test_a_student_whose_loss_explodes_fails_alone_and_says_where(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    students = [
        {"name": "wild", "model": "digits_net_4", "train": {"lr": 1e30, "momentum": 0.0, "nesterov": False}},
        {"name": "tame", "model": "digits_net_4"},
    ]
    done = krd("distill", distill_config(students, evaluate=True))
    run = tmp_path / "run"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "student wild, rank 0: the loss is not finite at epoch" in done.stderr
    assert "sample ids" in done.stderr
    assert json.loads((run / "students/tame/result.json").read_text())["status"] == "finished"
    assert json.loads((run / "students/wild/result.json").read_text())["status"] == "failed"
    assert "failed" in done.stdout
    assert set(json.loads((run / "evaluation.json").read_text())["models"]) == {"teacher", "tame"}


def test_a_killed_driver_is_resumed_and_finished_students_are_left_alone(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    students = [
        {"name": "short", "model": "digits_net_4", "train": {"epochs": 2}},
        {"name": "long", "model": "digits_net_8"},
    ]
    run = tmp_path / "run"
    process = start_krd("distill", distill_config(students, train=LONG))
    wait_for(lambda: '"finished"' in _text(run / "students/short/result.json"), process)
    wait_for(lambda: len(rows_of(run, "long", "coverage")) >= 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    _wait_for_end(rows_of(run, "long", "start")[-1]["pid"])  # workers outlive their driver by a second or two
    before = len(rows_of(run, "long", "coverage"))
    done = krd("distill", "--resume", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _covered(run, "long") == [(epoch, 0, 0) for epoch in range(EPOCHS)]
    resumed_at = rows_of(run, "long", "start")[-1]["epoch"]
    assert before - 1 <= resumed_at <= before + 1, (
        "the kill may fall between an epoch's row and its checkpoint"
    )
    assert len(rows_of(run, "short", "start")) == 1


def test_sigterm_stops_with_a_clear_line_and_resume_finishes(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    students = [{"name": "only", "model": "digits_net_4"}, {"name": "beside", "model": "digits_net_8"}]
    process = start_krd("distill", distill_config(students, train=LONG, students_per_process=2))
    wait_for(lambda: len(rows_of(run, "only", "coverage")) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert (
        "stopped by SIGTERM; the last checkpoint of every student is kept, "
        f"continue with `krd distill --resume {run}`" in output
    )
    done = krd("distill", "--resume", run)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("only", "beside"):
        assert _covered(run, name) == [(epoch, 0, 0) for epoch in range(EPOCHS)]
        assert [row["process"] for row in rows_of(run, name, "start")] == [["only", "beside"]] * 2
