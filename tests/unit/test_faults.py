"""The fault harness notices what was lost, doubled, skipped or said wrongly; every fault is a whole record."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.registry import FAULTS
from benchmarks.faults.running import MARK, Scene
from benchmarks.faults.setting import STUDENTS, Files
from benchmarks.faults.table import row_of
from benchmarks.faults.verdict import RECOVERIES, checks_of, difference, line_of_epochs, samples_of
from krd_ray.config import RunConfig
from krd_ray.train.rundir import MetricsLog, RunDir

STEPS = {0: 10, 1: 20, 2: 30}


def start(attempt: int, epoch: int) -> dict[str, Any]:
    return {"split": "start", "attempt": attempt, "epoch": epoch, "step": epoch * 10}


def epoch_row(attempt: int, epoch: int, **changes: int) -> dict[str, Any]:
    counted = {"seen": 100, "missed": 0, "doubled": 0, "step": 10 * (epoch + 1)}
    return {"split": "coverage", "attempt": attempt, "epoch": epoch, **counted, **changes}


CLEAN = [start(0, 0), epoch_row(0, 0), epoch_row(0, 1), epoch_row(0, 2)]
AGAIN = [start(0, 0), epoch_row(0, 0), epoch_row(0, 1), start(1, 1), epoch_row(1, 1), epoch_row(1, 2)]


def test_epochs_done_again_after_a_restart_stand_once_in_the_line() -> None:
    assert [(row["attempt"], row["epoch"]) for row in line_of_epochs(AGAIN)] == [(0, 0), (1, 1), (1, 2)]
    none = {"lost": 0, "doubled": 0, "epochs_missing": 0, "wrong_steps": 0}
    assert samples_of(CLEAN, STEPS) == none | {"epochs_again": 0}
    assert samples_of(AGAIN, STEPS) == none | {"epochs_again": 1}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([start(0, 0), epoch_row(0, 0), epoch_row(0, 1, missed=3), epoch_row(0, 2)], {"lost": 3}),
        ([start(0, 0), epoch_row(0, 0, doubled=2), epoch_row(0, 1), epoch_row(0, 2)], {"doubled": 2}),
        (
            [start(0, 0), epoch_row(0, 0), start(1, 2), epoch_row(1, 2)],
            {"lost": 100, "epochs_missing": 1},
        ),
        (
            [start(0, 0), epoch_row(0, 0), epoch_row(0, 1), epoch_row(0, 1), epoch_row(0, 2)],
            {"doubled": 100},
        ),
        ([start(0, 0), epoch_row(0, 0), epoch_row(0, 1, step=21), epoch_row(0, 2)], {"wrong_steps": 1}),
    ],
    ids=["missed", "doubled", "epoch skipped", "epoch twice in one attempt", "a step too many"],
)
def test_what_was_lost_or_doubled_is_found(rows: list[dict[str, Any]], found: dict[str, int]) -> None:
    counted = samples_of(rows, STEPS)
    assert {key: value for key, value in counted.items() if value} == found


def write_student(root: Path, weight: float, balanced: float) -> RunDir:
    run = RunDir(root)
    MetricsLog(run.student("hit"), "hit", 0).write("val", 2, 30, balanced=balanced)
    save_file({"w": torch.tensor([weight])}, run.student("hit").weights)
    return run


def test_weights_that_differ_in_one_bit_differ(tmp_path: Path) -> None:
    one = write_student(tmp_path / "a", 1.0, 0.5)
    assert difference(one, write_student(tmp_path / "b", 1.0, 0.5), "hit") == {"weights": 0.0, "metrics": 0.0}
    other = write_student(tmp_path / "c", 1.0 + 2**-23, 0.75)
    assert difference(one, other, "hit") == {"weights": 2.0**-23, "metrics": 0.25}


def kept(**changes: Any) -> dict[str, Any]:
    """What was found of a run that kept every promise."""
    none = {"weights": 0.0, "metrics": 0.0}
    student = {**samples_of(CLEAN, STEPS), "differs": none, "spread": none}
    return {
        "exit_codes": [0],
        "restarts": {"teacher": 1, "hit": 0, "spared": 0},
        "recover_s": 3.0,
        "left_over": 0,
        "students": {"hit": student, "spared": student},
        "forwards_per_unique_view": 1.0,
    } | changes


@pytest.mark.parametrize(
    ("changes", "output", "broken"),
    [
        ({}, "done", set()),
        ({"exit_codes": [1]}, "done", {"exit codes"}),
        ({"restarts": {"teacher": 1, "hit": 0, "spared": 1}}, "done", {"restarts"}),
        ({"recover_s": 15.1}, "done", {"recovered"}),
        ({"recover_s": None}, "done", {"recovered"}),
        ({"left_over": 2}, "done", {"no process left"}),
        ({"forwards_per_unique_view": 1.01}, "done", {"forwards once"}),
        ({}, "Traceback (most recent call last)", {"no traceback"}),
    ],
)
def test_each_part_of_a_promise_can_be_broken(changes: dict[str, Any], output: str, broken: set[str]) -> None:
    checks = checks_of(FAULTS["teacher-killed"], kept(**changes), [output])
    assert {part for part, is_kept in checks.items() if not is_kept} == broken


def test_a_message_is_looked_for_in_the_command_that_was_struck_across_line_breaks() -> None:
    fault = replace(FAULTS["sigterm"], forwards_once=False)
    found = kept(exit_codes=[130, 0])
    said = "stopped by SIGTERM; the last\ncheckpoint of every student is kept, `krd distill --resume`"
    assert checks_of(fault, found, [said, "done"])["message"]
    assert not checks_of(fault, found, ["stopped", said])["message"]


def test_every_fault_has_a_config_that_is_valid_and_a_promise(tmp_path: Path) -> None:
    assert len(FAULTS) >= 12
    files = Files(tmp_path / "shards", tmp_path / "teacher.safetensors")
    for fault in FAULTS.values():
        config = files.config(fault.setting, tmp_path / "run", dict(fault.changes))
        names = {student.name for student in RunConfig.model_validate(config).students}
        assert set(fault.equal) <= names == {each["name"] for each in STUDENTS[fault.setting]}
        assert fault.recovered in RECOVERIES
        assert bool(fault.says) == (fault.exit_code in (1, 130)), "who stops says why"
        assert fault.again or fault.exit_code in (0, 1)


def test_a_table_says_what_was_broken() -> None:
    students = {"hit": kept()["students"]["hit"]}
    good = kept(students=students, kept=True, checks={"equal": True})
    bad = kept(students=students, kept=False, checks={"equal": False}, recover_s=5.0)
    cells = row_of("teacher-killed", [good, bad])
    assert cells[2:4] == ["survives", "1 of 2"]
    assert cells[-1] == "equal"
    assert "3.0 to 5.0" in cells


def test_a_killed_command_keeps_its_exit_code(tmp_path: Path) -> None:
    scene = Scene(
        RunDir(tmp_path / "run"), tmp_path / "c.yaml", tmp_path, "mark-of-this-test", random.Random(0), 0
    )
    scene.process = subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: scene.mark})
    scene.outputs.append(str(tmp_path / "output.txt"))
    (tmp_path / "output.txt").write_text("")
    scene.kill_all()
    scene.finish()
    assert scene.exit_codes == [-signal.SIGKILL]
