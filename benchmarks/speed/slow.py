"""Answers whether a slow student delays the others: eight students, one of which sleeps before each step.

Three forms take turns: eight quick students; seven and a slow one; seven and a slow one that asks for no targets. A
sleeping student leaves its share of the cores to the others, the last form shows what its late questions cost.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.cells import MACHINES, Cell
from benchmarks.speed.krd_runs import krd_run
from benchmarks.speed.setting import prepare_files
from benchmarks.speed.slow_net import NET, SLEEP_S
from krd_ray.config import RayConfig
from krd_ray.train.cluster import connected

TEACHER, NUM_STUDENTS, SLOW = "resnet20", 8, "slow"
SLOW_EPOCHS = 2  # enough to outlast the others
ROUNDS = 2
SHARE = MACHINES["cpu"].resources
FORMS = ("none", "slow_asks", "slow_asks_nothing")


def measure_slow(root: Path, *, epochs: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Runs each form once a round; the quick students' images/s are medians over epochs, then over rounds."""
    cell = Cell(TEACHER, NET, NUM_STUDENTS, epochs=epochs)
    prepare_files(root, cell)
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    with connected(RayConfig(num_cpus=2)):
        for number in range(rounds):
            for form in FORMS:
                runs[form].append(_speeds(krd_run(root, f"{form}-{number}", cell, students=_students(form))))
    quick = [f"student{k}" for k in range(NUM_STUDENTS - 1)]
    rate = {
        form: {name: median(run["images_per_s"][name] for run in runs[form]) for name in quick}
        for form in FORMS
    }
    slow = median(run["images_per_s"][SLOW] for run in runs["slow_asks"])
    found = {
        f"against_{form}": _ratios(rate["slow_asks"], rate[form]) for form in FORMS if form != "slow_asks"
    }
    slowness = median(rate["slow_asks"].values()) / slow
    return {"sleep_s": SLEEP_S, "students": NUM_STUDENTS, "slowness": slowness, **found, "runs": runs}


def _students(form: str) -> list[dict[str, Any]]:
    num_quick = NUM_STUDENTS if form == "none" else NUM_STUDENTS - 1
    students = [{"name": f"student{k}", "model": NET, "resources": SHARE} for k in range(num_quick)]
    if form == "none":
        return students
    model = "benchmarks.speed.slow_net:slow_net"
    slow: dict[str, Any] = {
        "name": SLOW, "model": model, "resources": SHARE, "train": {"epochs": SLOW_EPOCHS}
    }  # fmt: skip
    if form == "slow_asks_nothing":
        slow["loss"] = {"kd": {"weight": 0.0}}
    return [*students, slow]


def _ratios(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    ratios = [now[name] / before[name] for name in now]
    return {"median": median(ratios), "worst": min(ratios)}


def _speeds(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "images_per_s": run["images_per_s"],
        "forwards_per_unique_view": run["ledger"]["forwards_per_unique_view"],
    }
