"""Answers what sharing one teacher costs a search, against the same trials with a teacher that costs nothing.

Does not train by itself: both are `krd tune` searches in one cluster, taking turns. The free teacher is a store that
was filled before the clock starts (`teacher.placement: stored`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from krd_ray.atomic import write_text
from krd_ray.config import RayConfig, RunConfig
from krd_ray.config_io import load_config
from krd_ray.errors import RunError
from krd_ray.train.cluster import connected
from krd_ray.train.fill import fill_targets
from krd_ray.train.rundir import read_json
from krd_ray.tune.search import new_search, run_search
from krd_ray.tune.search_dir import SearchOptions
from krd_ray.tune.study import open_storage, open_study, queue_first

HERE = Path(__file__).parent
SPACE = HERE.parents[1] / "tune_spaces/loss_weights.py"
NUM_CPUS, AT_ONCE = 2, 3  # three students of half a CPU beside a teacher of a quarter
LIMIT = 1.15


@dataclass(frozen=True)
class Bound:
    """What is measured: trials of a search, and pairs of searches."""

    trials: int
    rounds: int


def measure_bound(root: Path, results: Path, settings: Sequence[str], bound: Bound) -> dict[str, Any]:
    """Runs the searches in turn, shared, free, free, shared, and compares their wall times.

    Args:
        root: folder of the searches.
        results: folder of the table.
        settings: laid over the config.
        bound: how many.
    Returns:
        Seconds and forwards of every search, and the ratio of the sums of seconds.
    Raises:
        RunError: a search did not complete all its trials, or the teacher forwarded a view twice.
    """
    config = load_config(HERE / "configs/bound.yaml", settings)
    store = root / "store"
    found: list[dict[str, Any]] = []
    with connected(RayConfig(num_cpus=NUM_CPUS)):
        fill_targets(_placed(config, "actors", root, store), typer.echo)
        for turn in range(bound.rounds):
            for kind in ("actors", "stored") if turn % 2 == 0 else ("stored", "actors"):
                found.append(_search(config, kind, root, store, bound.trials, turn))
    seconds = {
        kind: sum(each["seconds"] for each in found if each["kind"] == kind) for kind in ("actors", "stored")
    }
    outcome = {
        "trials": bound.trials,
        "epochs": config.train.epochs,
        "views": config.views.cycle,
        "at_once": AT_ONCE,
        "num_train": found[0]["num_train"],
        "searches": found,
        "ratio": seconds["actors"] / seconds["stored"],
        "limit": LIMIT,
    }
    write_text(results / "bound.md", _table(outcome))
    typer.echo(_table(outcome))
    return outcome


def _placed(config: RunConfig, placement: str, folder: Path, store: Path | None) -> RunConfig:
    assert config.teacher is not None
    teacher = {"placement": placement, "persist": True, "spill_dir": str(store) if store else None}
    update = {"run_dir": str(folder), "teacher": config.teacher.model_copy(update=teacher)}
    return config.model_copy(update=update)


def _search(config: RunConfig, kind: str, root: Path, store: Path, trials: int, turn: int) -> dict[str, Any]:
    """One search; the shared teacher's has a store of its own, empty at the start."""
    folder = root / f"{kind}-{turn}"
    placed = _placed(config, kind, folder, store if kind == "stored" else None)
    options = SearchOptions(trials=trials, epochs=0, at_once=AT_ONCE)
    started = time.perf_counter()
    search = new_search(placed, SPACE, options, student=None, say=typer.echo)
    study = open_study(open_storage(None, folder), search.options.study, search.space)
    queue_first(study, None, _points(trials - 1))
    record = run_search(search, typer.echo)
    seconds = time.perf_counter() - started
    if record["counts"]["complete"] != trials:
        raise RunError(
            f"{folder}: {record['counts']['complete']} of {trials} trials completed; see trials.csv"
        )
    ledger = read_json(folder / "ledger.json")
    expected = (config.views.cycle or 0) * record["num_train"] if kind == "actors" else 0
    if ledger["teacher"]["forwards"] != expected:
        raise RunError(f"{folder}: {ledger['teacher']['forwards']:,} forwards, expected {expected:,}")
    return {
        "kind": kind,
        "turn": turn,
        "seconds": seconds,
        "forwards": ledger["teacher"]["forwards"],
        "num_train": record["num_train"],
        "trial_seconds": ledger["search"]["trial_seconds"],
        "forwards_one_teacher_per_trial": ledger["search"]["forwards_one_teacher_per_trial"],
    }


def _points(number: int) -> list[dict[str, float]]:
    """The same trials in every search, so that nothing depends on what finished first."""
    draws = random.Random(0)
    names = ("loss.rrd.weight", "loss.lrd.weight")
    points = [{name: 10 ** draws.uniform(-1, 1) for name in names} for _ in range(number)]
    return [{**point, "loss.classification.weight": draws.uniform(0.1, 2.0)} for point in points]


def _table(outcome: dict[str, Any]) -> str:
    lines = [
        f"{outcome['trials']} trials x {outcome['epochs']} epochs, {outcome['views']} views, {outcome['at_once']} at "
        f"once, {outcome['num_train']:,} images; searches in the order they ran.",
        "",
        "| search | seconds | teacher forwards | with one teacher per trial |",
        "|---|---:|---:|---:|",
    ]
    names = {"actors": "one shared teacher", "stored": "free teacher (filled store)"}
    for each in outcome["searches"]:
        lines.append(
            f"| {names[each['kind']]} | {each['seconds']:.1f} | {each['forwards']:,} | "
            f"{each['forwards_one_teacher_per_trial']:,} |"
        )
    held = "holds" if outcome["ratio"] <= outcome["limit"] else "does not hold"
    lines += [
        "",
        f"Wall time, shared over free: {outcome['ratio']:.3f}; the bound of {outcome['limit']} {held}.",
    ]
    return "\n".join(lines) + "\n"
