"""Answers how students that differ only in their seed become one row: methods, means, spreads.

Does not choose what is shown, and does not read files.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from krd_ray.report.read_run import Json, Row, Run, configured_students

SETTINGS = ("loss", "train", "workers")
"""What a student may set for itself that changes what its seeds average over."""


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Averages over seeds.

        m = sum(x) / n,   s = sqrt(sum((x - m)^2) / (n - 1))

    Args:
        values: [n], one per seed.
    Returns:
        The mean, None for no value; the sample standard deviation, None for fewer than two values.

    Example:
        >>> mean_and_std([1.0, 3.0]), mean_and_std([1.0]), mean_and_std([])
        ((2.0, 1.4142135623730951), (1.0, None), (None, None))
    """
    if not values:
        return None, None
    return fmean(values), stdev(values) if len(values) > 1 else None


def mean_over_seeds(rows: Iterable[Row], keys: Sequence[str], *, along: Sequence[str] = ()) -> list[Row]:
    """Replace the rows of one role, method and model by one row of means; the first row gives everything else.

    Args:
        rows: with `name, role, method, model, seed, status`, the keys and what they go along.
        keys: numbers to average over the rows that know any of them; a number that one of these rows does not
            know has no mean.
        along: what else tells rows apart, for instance `epoch`.
    Returns:
        Rows in order of first appearance, with `num_seeds` and, for each key, `<key>_std`.

    Example:
        >>> who = {"name": "a.s0", "role": "student", "method": "a", "model": "m", "status": "finished"}
        >>> [row] = mean_over_seeds([{**who, "seed": 0, "top1": 0.5}, {**who, "seed": 1, "top1": 0.7}], ["top1"])
        >>> row["name"], row["num_seeds"], round(row["top1"], 3), round(row["top1_std"], 3)
        ('a, m', 2, 0.6, 0.141)
    """
    cells: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[(row["role"], row["method"], row["model"], *(row[key] for key in along))].append(row)
    return [_mean_row(members, keys) for members in cells.values()]


def _mean_row(members: list[Row], keys: Sequence[str]) -> Row:
    first = members[0]
    known = [row for row in members if any(row[key] is not None for key in keys)]
    is_student = first["role"] == "student"
    mean_row = {key: value for key, value in first.items() if key not in keys}
    mean_row |= {
        "name": f"{first['method']}, {first['model']}" if is_student else first["name"],
        "seed": " ".join(str(row["seed"]) for row in known) if is_student else None,
        "status": state_of(row["status"] for row in members) or first["status"],
        "num_seeds": len(known) if is_student else None,
    }
    for key in keys:
        values = [row[key] for row in known]
        mean, std = (None, None) if None in values else mean_and_std(values)
        mean_row |= {key: mean, f"{key}_std": std}
    return mean_row


def state_of(states: Iterable[str]) -> str:
    """Say which of several students did not come to their end; nothing if all did.

    Example:
        >>> state_of(["finished", "failed", "finished"]), state_of(["finished"]), state_of(["failed", "failed"])
        ('1 of 3 failed', '', 'failed')
    """
    counts = Counter(states)
    total = counts.total()
    odd = {state: num for state, num in counts.items() if state not in ("finished", "tested")}
    return ", ".join(state if num == total else f"{num} of {total} {state}" for state, num in odd.items())


def seed_of(run: Run, student: str) -> int:
    """The seed a student trained with: its own, else the run's."""
    own = configured_students(run.config).get(student, {}).get("seed")
    return int(run.config.get("seed", 0) if own is None else own)


def methods_of(run: Run) -> dict[str, str | None]:
    """Name the method of every student, so that students of one method and model differ in their seed alone.

    A student's `method` names it, else its loss's label; None where neither is known yet. Students that share
    both method and model, and also their seed or not their settings, are no seeds of one thing: each stands
    for itself, as `method (student)`.

    Args:
        run: as `read_run` gives it.
    Returns:
        student -> method, in the order of the settings.
    """
    methods = labels_of(run)
    cells: dict[tuple[str | None, Any], list[str]] = defaultdict(list)
    for name, method in methods.items():
        cells[(method, model_of(run, name))].append(name)
    for (method, _), names in cells.items():
        differ = {_settings(configured_students(run.config).get(name, {})) for name in names}
        if method is not None and (
            len({seed_of(run, name) for name in names}) < len(names) or len(differ) > 1
        ):
            methods |= {name: f"{method} ({name})" for name in names}
    return methods


def labels_of(run: Run) -> dict[str, str | None]:
    """The method that each student's settings name, else its loss's label; in the order of the settings."""
    configured = configured_students(run.config)
    ended = {student.name: student.result.get("loss_name") for student in run.students}
    names = [name for name in configured if name in ended] + [
        name for name in ended if name not in configured
    ]
    return {name: configured.get(name, {}).get("method") or ended[name] for name in names}


def model_of(run: Run, student: str) -> Any:
    """The name of a student's model, wherever the run directory says it."""
    result = next((each.result for each in run.students if each.name == student), {})
    entry = run.evaluation["models"].get(student, {}) if run.evaluation else {}
    configured = configured_students(run.config).get(student, {})
    return result.get("model") or entry.get("model") or configured.get("model")


def compares(run: Run) -> bool:
    """True for a comparison: a method is named, or one method and model was trained with several seeds."""
    configured = configured_students(run.config)
    if len(configured) > 1 and any(entry.get("method") for entry in configured.values()):
        return True
    methods = {name: method for name, method in methods_of(run).items() if method is not None}
    cells = Counter((method, model_of(run, name)) for name, method in methods.items())
    return max(cells.values(), default=0) > 1


def _settings(configured: Json) -> str:
    return json.dumps([configured.get(key) for key in SETTINGS], sort_keys=True, default=str)
