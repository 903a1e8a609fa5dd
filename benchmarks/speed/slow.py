"""Answers whether a slow student delays the others: eight students, one of which sleeps before each step.

Three forms take turns: eight quick students; seven and a slow one; seven and a slow one that asks for no targets. A
sleeping student leaves its share of the cores to the others, the last form shows what its late questions cost.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.cells import COOL_DOWN_EPOCHS, MACHINES, WARM_UP_EPOCHS, Cell
from benchmarks.speed.krd_runs import krd_run
from benchmarks.speed.setting import prepare_files
from benchmarks.speed.slow_net import NET, SLEEP_S
from krd_ray.config import RayConfig
from krd_ray.errors import RunError
from krd_ray.train.cluster import connected

TEACHER, NUM_STUDENTS, SLOW = "resnet20", 8, "slow"
EPOCHS = WARM_UP_EPOCHS + 24 + COOL_DOWN_EPOCHS  # a minute: equal students of shorter runs differ by 30 %
ROUNDS = 5
SHARE = MACHINES["cpu"].resources
FORMS = ("none", "slow_asks", "slow_asks_nothing")

Rates = list[float]  # images/s of the seven quick students of a run


def measure_slow(root: Path, *, epochs: int = EPOCHS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Runs each form once a round and returns images/s, and ratios of the form with a slow student to the others."""
    cell = Cell(TEACHER, NET, NUM_STUDENTS, epochs=epochs)
    prepare_files(root, cell)
    slow_epochs = WARM_UP_EPOCHS + COOL_DOWN_EPOCHS + max(1, epochs // 4)
    runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    with connected(RayConfig(num_cpus=2)):
        for number in range(rounds):
            for form in FORMS:
                found = krd_run(root, f"{form}-{number}", cell, students=_students(form, slow_epochs))
                runs[form].append(_speeds(found))
                _refuse_early_end(runs[form][-1]["images_per_s"], epochs, slow_epochs)
    rates = {form: [_quick(run["images_per_s"]) for run in each] for form, each in runs.items()}
    slow = median(run["images_per_s"][SLOW] for run in runs["slow_asks"])
    compared = {
        f"against_{form}": compare(rates["slow_asks"], rates[form]) for form in FORMS if form != "slow_asks"
    }
    slowness = median(map(median, rates["slow_asks"])) / slow
    return {"sleep_s": SLEEP_S, "students": NUM_STUDENTS, "slowness": slowness, **compared, "runs": runs}


def compare(now: list[Rates], before: list[Rates]) -> dict[str, float]:
    """Ratios of images/s: all quick students together, the median one, the slowest one, each of them by place.

    Equal students of a run are interchangeable, so they are compared by their place in it: the slowest with the
    slowest, the next with the next. Rates of a place are medians over rounds.

    Returns:
        `together`, `median`, `slowest`; `worst`: the least ratio of any place.
    """
    by_place = [[median(rates) for rates in zip(*map(sorted, runs), strict=True)] for runs in (now, before)]
    ratios = [a / b for a, b in zip(*by_place, strict=True)]
    return {
        "together": sum(by_place[0]) / sum(by_place[1]),
        "median": median(by_place[0]) / median(by_place[1]),
        "slowest": ratios[0],
        "worst": min(ratios),
    }


def _students(form: str, slow_epochs: int) -> list[dict[str, Any]]:
    num_quick = NUM_STUDENTS if form == "none" else NUM_STUDENTS - 1
    students = [{"name": f"student{k}", "model": NET, "resources": SHARE} for k in range(num_quick)]
    if form == "none":
        return students
    model = "benchmarks.speed.slow_net:slow_net"
    slow: dict[str, Any] = {
        "name": SLOW, "model": model, "resources": SHARE, "train": {"epochs": slow_epochs}
    }  # fmt: skip
    if form == "slow_asks_nothing":
        slow["loss"] = {"kd": {"weight": 0.0}}
    return [*students, slow]


def _quick(images_per_s: dict[str, float]) -> Rates:
    return [images_per_s[f"student{k}"] for k in range(NUM_STUDENTS - 1)]


def _refuse_early_end(images_per_s: dict[str, float], epochs: int, slow_epochs: int) -> None:
    """A slow student that ends before the others leaves them alone for the rest."""
    slow, slowest = images_per_s.get(SLOW), min(_quick(images_per_s))
    if slow is not None and slow_epochs / slow < (epochs - COOL_DOWN_EPOCHS) / slowest:
        raise RunError(
            f"the slow student made {slow:.0f} images/s for {slow_epochs} epochs and ended before the others "
            f"({slowest:.0f} images/s for {epochs} epochs): make slow_net.SLEEP_S larger"
        )


def _speeds(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "images_per_s": run["images_per_s"],
        "forwards_per_unique_view": run["ledger"]["forwards_per_unique_view"],
    }
