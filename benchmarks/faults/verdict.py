"""Answers whether a run kept what was promised: samples, steps, weights, metrics, message, restarts, seconds.

Does not run anything. What it compares was written by the run itself; weights are compared bit by bit.

Samples: a worker counts the ids of the batches it has trained, all ranks together, against the plan of the epoch,
and writes what was missed and what came twice (`coverage` rows). A process that dies may leave epochs that a later
attempt does again from an older checkpoint; the weights at the end come from one line of epochs, the last attempt's
of each. Here that line is followed: every epoch stands in it once, without a sample missed or doubled, and its
optimiser steps are those of the unfaulted run. Equal bits of the final weights say the same of the order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults.registry import Fault
from benchmarks.faults.running import Row, Scene
from benchmarks.faults.setting import EPOCHS
from krd_ray.train.rundir import RunDir, read_json

NO_METRIC = {"time", "student", "attempt", "epoch", "step", "split"}


def line_of_epochs(rows: Sequence[Row]) -> list[Row]:
    """Returns the `coverage` rows that the final weights descend from: an attempt's, up to where the next began."""
    starts = {row["attempt"]: row["epoch"] for row in rows if row["split"] == "start"}
    line: list[Row] = []
    for attempt, first in sorted(starts.items()):
        line = [row for row in line if row["epoch"] < first]
        line += [row for row in rows if row["split"] == "coverage" and row["attempt"] == attempt]
    return line


def samples_of(rows: Sequence[Row], steps: dict[int, int]) -> dict[str, int]:
    """Returns samples lost and doubled in completed epochs of the line, and epochs that were trained again.

    Args:
        rows: a student's metric rows.
        steps: optimiser steps done at the end of each epoch of the unfaulted run.
    """
    line = line_of_epochs(rows)
    epochs = [row["epoch"] for row in line]
    missing = set(steps) - set(epochs)
    return {
        "lost": sum(row["missed"] for row in line) + sum(line[0]["seen"] for _ in missing if line),
        "doubled": sum(row["doubled"] for row in line)
        + sum(row["seen"] for k, row in enumerate(line) if row["epoch"] in epochs[:k]),
        "epochs_missing": len(missing),
        "epochs_again": sum(row["split"] == "coverage" for row in rows) - len(line),
        "wrong_steps": sum(row["step"] != steps[row["epoch"]] for row in line),
    }


def steps_of(rows: Sequence[Row]) -> dict[int, int]:
    """Returns optimiser steps done at the end of each epoch of a run's line."""
    return {row["epoch"]: row["step"] for row in line_of_epochs(rows)}


def final_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the numbers of the last validation."""
    last = [row for row in rows if row["split"] == "val"][-1]
    return {k: v for k, v in last.items() if k not in NO_METRIC and isinstance(v, int | float)}


def difference(left: RunDir, right: RunDir, student: str) -> dict[str, float]:
    """Returns the largest difference of a student's final weights and of its last validation between two runs."""
    ours, theirs = (load_file(run.student(student).weights) for run in (left, right))
    if ours.keys() != theirs.keys():
        return {"weights": float("inf"), "metrics": float("inf")}
    weights = max(_apart(ours[name], theirs[name]) for name in ours)
    first, second = (final_metrics(run.student(student).rows()) for run in (left, right))
    metrics = max((abs(first[name] - second[name]) for name in first), default=0.0)
    return {"weights": weights, "metrics": metrics}


def _apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """0 only where all bits are equal."""
    if torch.equal(left, right):
        return 0.0
    return max(float((left.double() - right.double()).abs().max()), torch.finfo(torch.float64).tiny)


def _served(scene: Scene) -> float | None:
    """Until the teacher's new process has answered a request; its statistics come at most a second later."""
    rows = scene.teacher_rows()
    before = max((row["incarnation"] for row in rows if row["time"] <= scene.struck_at), default=0)
    times = [row["time"] for row in rows if row["incarnation"] > before and row["requests"] > 0]
    return min(times) - scene.struck_at if times else None


def _trained(scene: Scene) -> float | None:
    """Until `hit`'s new worker has trained an epoch."""
    rows = scene.run.student("hit").rows()
    before = max((row["attempt"] for row in rows if row["time"] <= scene.struck_at), default=0)
    times = [row["time"] for row in rows if row["attempt"] > before and row["split"] == "train"]
    return min(times) - scene.struck_at if times else None


def _went_on(scene: Scene) -> float | None:
    """From the fault's end until `hit` has trained an epoch."""
    return _first_trained(scene, scene.restored_at, ("hit",))


def _resumed(scene: Scene) -> float | None:
    """From the start of the command that resumes until a student has trained an epoch."""
    return _first_trained(scene, scene.restored_at, ("hit", "spared"))


def _stopped(scene: Scene) -> float | None:
    """Until the command has ended."""
    return scene.ended_at - scene.struck_at


def _first_trained(scene: Scene, since: float, names: Sequence[str]) -> float | None:
    times = [row["time"] for name in names for row in scene.rows(name, "train") if row["time"] > since]
    return min(times) - since if times else None


def judge(fault: Fault, scene: Scene, unfaulted: Sequence[RunDir]) -> dict[str, Any]:
    """Compares a run, after its last command has ended, with its promise and with two unfaulted runs."""
    found: dict[str, Any] = {
        "exit_codes": scene.exit_codes,
        "restarts": _restarts(scene.run),
        "recover_s": RECOVERIES[fault.recovered](scene),
        "left_over": scene.notes.get("left_over", 0),
        "students": {name: _student(scene.run, unfaulted, name) for name in fault.equal},
        "notes": scene.notes,
    }
    ledger = read_json(scene.run.ledger) if scene.run.ledger.is_file() else {}
    found["forwards_per_unique_view"] = ledger.get("forwards_per_unique_view")
    found["checks"] = checks_of(fault, found, scene.outputs)
    found["kept"] = all(found["checks"].values())
    return found


def checks_of(fault: Fault, found: Row, outputs: Sequence[str]) -> dict[str, bool]:
    """Returns each part of the promise and whether it was kept."""
    first = re.sub(r"\s+", " ", outputs[0])
    students = found["students"].values()
    wanted = [fault.exit_code] + ([0] if fault.again else [])
    seconds = found["recover_s"]
    checks = {
        "exit codes": found["exit_codes"] == wanted,
        "message": all(text in first for text in fault.says),
        "no traceback": not re.search(r"Traceback|^ *File \"", "\n".join(outputs), re.MULTILINE),
        "no process left": found["left_over"] == 0,
        "no sample lost or doubled": all(
            each[key] == 0
            for each in students
            for key in ("lost", "doubled", "epochs_missing", "wrong_steps")
        ),
        "at most one epoch again": all(each["epochs_again"] <= 1 for each in students),
        "equal": all(
            each["differs"][key] <= (0.0 if fault.equality == "bits" else each["spread"][key])
            for each in students
            for key in ("weights", "metrics")
        ),
        "restarts": all(found["restarts"].get(who) == times for who, times in fault.restarts.items()),
        "recovered": seconds is not None and (fault.within_s is None or seconds <= fault.within_s),
    }
    if fault.forwards_once:
        checks["forwards once"] = found["forwards_per_unique_view"] == 1.0
    return checks


def _student(run: RunDir, unfaulted: Sequence[RunDir], name: str) -> Row:
    rows = run.student(name).rows()
    if not run.student(name).weights.is_file():
        return {
            "lost": 0,
            "doubled": 0,
            "epochs_missing": EPOCHS,
            "epochs_again": 0,
            "wrong_steps": 0,
            "differs": {"weights": float("inf"), "metrics": float("inf")},
            "spread": difference(unfaulted[0], unfaulted[1], name),
        }
    counted = samples_of(rows, steps_of(unfaulted[0].student(name).rows()))
    return {
        **counted,
        "differs": difference(run, unfaulted[0], name),
        "spread": difference(unfaulted[0], unfaulted[1], name),
        "metrics": final_metrics(rows),
        "unfaulted": final_metrics(unfaulted[0].student(name).rows()),
    }


def _restarts(run: RunDir) -> dict[str, int]:
    """By who, as the ledger counts them; empty where there is none."""
    if not run.ledger.is_file():
        return {}
    ledger = read_json(run.ledger)
    teacher = ledger["teacher"] or {"restarts": 0}
    return {"teacher": teacher["restarts"]} | {k: v["restarts"] for k, v in ledger["students"].items()}


RECOVERIES: dict[str, Callable[[Scene], float | None]] = {
    "served": _served,
    "trained": _trained,
    "went on": _went_on,
    "resumed": _resumed,
    "stopped": _stopped,
}
