"""Answers whether a search finds something better than the default on CIFAR-100-LT, over several seeds.

Does not choose by the test split: the search selects on val, and its confirmation reads test once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from krd_ray.config import RayConfig
from krd_ray.config_io import load_config
from krd_ray.report.read_search import read_search
from krd_ray.report.search_page import confirmed
from krd_ray.report.verdict import sentence
from krd_ray.train.cluster import connected
from krd_ray.train.rundir import read_json
from krd_ray.tune.command import print_search
from krd_ray.tune.search import new_search, run_search
from krd_ray.tune.search_dir import SearchOptions

HERE = Path(__file__).parent
KEPT = ("trials.csv",)  # best.yaml names folders of the machine; its settings are among the figures
NUM_CPUS = 2


def search_gain(
    root: Path, results: Path, settings: Sequence[str], space: Path, *, trials: int, epochs: int, tiny: bool
) -> dict[str, Any]:
    """Searches, confirms over seeds 0, 1 and 2, and keeps figures and pictures.

    Args:
        root: folder of the search.
        results: folder of what is kept.
        settings: laid over the config.
        space: what is searched.
        trials, epochs: of the search; the confirmation trains all the config's epochs.
        tiny: one seed and one epoch.
    Returns:
        The best settings, what the trials cost, and the comparison on the test split.
    """
    own = ["train.epochs=1", "train.warmup_epochs=0"] if tiny else []
    config = load_config(HERE / "configs/gain.yaml", [f"run_dir={root}", *settings, *own])
    seeds = (0,) if tiny else (0, 1, 2)
    options = SearchOptions(trials=trials, epochs=epochs, grace_epochs=0, confirm_seeds=seeds)
    with connected(RayConfig(num_cpus=NUM_CPUS)):
        search = new_search(config, space, options, student=None, say=typer.echo)
        record = run_search(search, typer.echo)
    print_search(search.folder, typer.echo)
    results.mkdir(parents=True, exist_ok=True)
    for file in [*(root / name for name in KEPT), *sorted((root / "report").glob("*.png"))]:
        shutil.copy(file, results / file.name)
    found = confirmed(read_search(root))
    names = [metric.partition("/")[2] for metric in record["metric"]]
    ledger = read_json(root / "ledger.json")
    return {
        "space": record["space"],
        "options": {key: record["options"][key] for key in ("trials", "epochs", "seed", "grace_epochs")},
        "counts": record["counts"],
        "seconds": record["seconds"],
        "best": record["best"],
        "importance": record["importance"],
        "cost": ledger["search"],
        "forwards_per_unique_view": ledger["forwards_per_unique_view"],
        "confirmation": [asdict(each) | {"is_clear": each.is_clear} for each in found],
        "verdict": [sentence(each) for each in found if each.metric in names],
    }
