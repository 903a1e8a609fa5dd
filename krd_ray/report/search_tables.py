"""Answers which numbers the page of a search shows: trials in order, best so far, slices, front, cost.

Does not read files and does not draw.
"""

from __future__ import annotations

from typing import Any

from krd_ray.report.read_run import Row
from krd_ray.report.read_search import PARAM, SearchRecord

COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"


def kind_of(search: SearchRecord, trial: Row) -> str:
    """What a trial is in a picture: a key of `palette.TRIAL_LOOKS`."""
    if trial["baseline"] and trial["state"] == COMPLETE:
        return "baseline"
    best = search.record.get("best") or {}
    if trial["number"] == best.get("number"):
        return "best"
    if trial["from"]:
        return "from an earlier search"
    return "complete" if trial["state"] == COMPLETE else "stopped early"


def _shown(search: SearchRecord) -> list[Row]:
    """Trials that have a figure for every objective."""
    return [
        trial
        for trial in search.trials
        if trial["state"] in (COMPLETE, STOPPED)
        and all(trial[metric] is not None for metric in search.metrics)
    ]


def history_rows(search: SearchRecord) -> list[Row]:
    """One row a trial and metric: what it reached, and the best complete trial up to it."""
    rows = []
    for metric, mode in zip(search.metrics, search.modes, strict=True):
        best: float | None = None
        for trial in _shown(search):
            value = trial[metric]
            better = best is None or (value > best if mode == "max" else value < best)
            if trial["state"] == COMPLETE and better and not trial["from"]:
                best = value
            rows.append(
                {
                    "metric": metric,
                    "number": trial["number"],
                    "kind": kind_of(search, trial),
                    "value": value,
                    "best_so_far": best,
                    "epochs": trial["epochs"],
                }
            )
    return rows


def importance_rows(search: SearchRecord) -> list[Row]:
    """One row a metric and parameter: the share of the metric's spread that it explains."""
    found: dict[str, dict[str, float]] = search.record.get("importance") or {}
    return [
        {"metric": metric, "parameter": name, "share": share}
        for metric, shares in found.items()
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]


def slice_rows(search: SearchRecord) -> list[Row]:
    """One row a trial, parameter and metric; parameters that a trial did not draw are left out."""
    return [
        {
            "parameter": name,
            "metric": metric,
            "number": trial["number"],
            "kind": kind_of(search, trial),
            "setting": trial[f"{PARAM}{name}"],
            "value": trial[metric],
        }
        for name in search.parameters
        for metric in search.metrics
        for trial in _shown(search)
        if trial[f"{PARAM}{name}"] is not None
    ]


def front_rows(search: SearchRecord) -> list[Row]:
    """Two objectives: one row a complete trial, with whether another one beats it; else nothing."""
    if len(search.metrics) < 2:
        return []
    first, second = search.metrics
    front = set(search.record.get("front") or [])
    return [
        {
            "first": first,
            "second": second,
            "number": trial["number"],
            "kind": kind_of(search, trial),
            "x": trial[first],
            "y": trial[second],
            "on_front": trial["number"] in front,
        }
        for trial in _shown(search)
        if trial["state"] == COMPLETE
    ]


def tail_rows(search: SearchRecord) -> list[Row]:
    """One row a complete trial: accuracy of many-shot and of few-shot classes on val."""
    return [
        {
            "first": "val/many",
            "second": "val/few",
            "number": trial["number"],
            "kind": kind_of(search, trial),
            "x": trial["val/many"],
            "y": trial["val/few"],
            "on_front": False,
        }
        for trial in search.trials
        if trial["state"] == COMPLETE and trial["val/many"] is not None and trial["val/few"] is not None
    ]


def cost_rows(search: SearchRecord) -> list[Row]:
    """Teacher forwards of this search, and of one teacher and store per trial; nothing without a teacher."""
    if search.ledger is None or not search.ledger.get("search"):
        return []
    found: dict[str, Any] = search.ledger["search"]
    if not found["forwards_one_teacher_per_trial"]:
        return []
    return [
        {"what": "one teacher per trial", "forwards": found["forwards_one_teacher_per_trial"]},
        {"what": "this search", "forwards": found["forwards"]},
    ]


def trial_table(search: SearchRecord) -> list[Row]:
    """All trials, best first, then stopped, failed and interrupted ones."""
    metric, sign = search.metrics[0], -1 if search.modes[0] == "max" else 1
    order = {COMPLETE: 0, STOPPED: 1, FAILED: 2}

    def place(trial: Row) -> tuple[float, ...]:
        known = trial[metric] is not None
        return (
            order.get(trial["state"], 3),
            0 if known else 1,
            sign * trial[metric] if known else 0,
            trial["number"],
        )

    return sorted(search.trials, key=place)
