"""Answers whether a slow student delays the others: eight students, one of which sleeps before each step.

Does not compare with eight quick ones alone: a sleeping student leaves its share of the cores to the others. It is
the same student without a teacher that shows what asking the teacher late does to the others.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.cells import Cell
from benchmarks.speed.krd_runs import krd_run
from benchmarks.speed.setting import SHARE, prepare_files
from benchmarks.speed.slow_net import NET, SLEEP_S
from krd_ray.config import RayConfig
from krd_ray.train.cluster import connected

TEACHER, NUM_STUDENTS, SLOW = "resnet20", 8, "slow"
SLOW_EPOCHS = 2  # enough to outlast the others


def measure_slow(root: Path, *, epochs: int) -> dict[str, Any]:
    """Runs eight quick students; seven and a slow one; seven and a slow one that asks for no targets."""
    prepare_files(root, TEACHER)
    cell = Cell(TEACHER, NET, NUM_STUDENTS, epochs=epochs)
    slow = {
        "name": SLOW,
        "model": "benchmarks.speed.slow_net:slow_net",
        "resources": SHARE,
        "train": {"epochs": SLOW_EPOCHS},
    }
    forms: dict[str, list[dict[str, Any]]] = {
        "none": [],
        "slow_asks": [slow],
        "slow_asks_nothing": [{**slow, "loss": {"kd": {"weight": 0.0}}}],
    }
    found: dict[str, Any] = {"sleep_s": SLEEP_S, "students": NUM_STUDENTS}
    with connected(RayConfig(num_cpus=2)):
        for form, extra in forms.items():
            quick = [
                {"name": f"student{k}", "model": NET, "resources": SHARE}
                for k in range(NUM_STUDENTS - len(extra))
            ]
            found[form] = _speeds(krd_run(root, form, cell, students=[*quick, *extra]))
    quick_ones = [name for name in found["slow_asks"]["images_per_s"] if name != SLOW]
    for form in ("none", "slow_asks_nothing"):
        before, now = found[form]["images_per_s"], found["slow_asks"]["images_per_s"]
        found[f"worst_against_{form}"] = min(now[name] / before[name] for name in quick_ones)
    rate = found["slow_asks"]["images_per_s"]
    found["slowness"] = median(rate[name] for name in quick_ones) / rate[SLOW]
    return found


def _speeds(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "images_per_s": run["images_per_s"],
        "forwards_per_unique_view": run["ledger"]["forwards_per_unique_view"],
    }
