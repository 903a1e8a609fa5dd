"""Answers which runs are read as one: same data, same settings, other seeds.

Does not average anything (`comparison` does).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from krd_ray.report.read_run import Run, configured_students
from krd_ray.report.seeds import SETTINGS, methods_of, model_of, seed_of

NOT_RESULTS = (
    "name",
    "seed",
    "run_dir",
    "data",
    "students",
    "students_at_once",
    "compare",
    "ray",
    "evaluate",
)
"""Settings in which runs may differ whose students are seeds of one thing; the data is compared by its content."""


def dataset_labels(runs: Sequence[Run]) -> dict[str, str]:
    """Name the data set of each run: its name and imbalance ratio, head count over tail count.

    Runs share a label, and so a row of means, if they trained on the same data with the same settings and no
    student of one repeats a method, model and seed of another; else the run's name is added.

    Returns:
        path of the run -> label.
    """
    alike: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        alike[_plain_label(run)].append(run)
    labels = {}
    for label, members in alike.items():
        shared = len({_settings(run) for run in members}) == 1 and not _repeats(members)
        short = Counter(run.path.resolve().name for run in members)
        for run in members:
            name = run.path.resolve().name
            own = label if shared else f"{label} ({name if short[name] == 1 else run.path})"
            labels[str(run.path)] = own
    return labels


def imbalance_ratio(run: Run) -> float | None:
    """Most training images of a class over fewest; None where a class has none."""
    counts = run.dataset["splits"]["train"]["class_counts"]
    return max(counts) / min(counts) if counts and min(counts) > 0 else None


def _plain_label(run: Run) -> str:
    ratio = imbalance_ratio(run)
    return str(run.dataset["name"]) + (f", imbalance {ratio:.3g}" if ratio is not None else "")


def _repeats(runs: Sequence[Run]) -> bool:
    """True if two students are the same experiment, or one method and model has two meanings."""
    seen: set[tuple[Any, ...]] = set()
    meanings: dict[tuple[Any, ...], list[Any]] = {}
    for run in runs:
        configured = configured_students(run.config)
        for name, method in methods_of(run).items():
            cell, seed = (method, model_of(run, name)), seed_of(run, name)
            settings = [configured.get(name, {}).get(key) for key in SETTINGS]
            if (*cell, seed) in seen or meanings.setdefault(cell, settings) != settings:
                return True
            seen.add((*cell, seed))
    return False


def _settings(run: Run) -> str:
    """What runs must share to be read as one: settings that change results, and the data's content."""
    settings = {key: value for key, value in run.config.items() if key not in NOT_RESULTS}
    settings["views"] = {key: value for key, value in (settings.get("views") or {}).items() if key != "seed"}
    teacher = settings.get("teacher") or {}
    settings["teacher"] = {key: teacher.get(key) for key in ("weights", "model")}
    counts = run.dataset["splits"]["train"]["class_counts"]
    return json.dumps([settings, counts, run.dataset.get("content_hash")], sort_keys=True, default=str)
