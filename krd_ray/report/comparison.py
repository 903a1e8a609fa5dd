"""Answers how methods compare over models, seeds and data sets: one row a method, with mean and spread.

Does not draw or write. Accuracies are fractions; a number that is not known is `None`.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from krd_ray.errors import ConfigError, RunError
from krd_ray.report.pooling import dataset_labels, imbalance_ratio
from krd_ray.report.read_run import Row, Run, last_rows, read_run
from krd_ray.report.seeds import mean_and_std, mean_over_seeds, methods_of, state_of
from krd_ray.report.tables import headline_rows, in_comparison_order

Split = Literal["test", "val"]
METRICS = ("top1", "many", "medium", "few", "balanced", "ece", "agreement")
DIFFERENCES = ("top1", "few")
COST = ("num_params", "num_flops", "latency_ms")


@dataclass(frozen=True)
class Comparison:
    """Methods compared on one split.

    Attributes:
        split: `test` or `val`.
        runs: what was read, in the order given.
        students: one row a student, with the raw figures.
        cells: one row a data set, method and model: `dataset, dataset_name, imbalance_ratio, role, method, model,
            num_seeds, num_students, seeds, state`, cost, and each of METRICS with `<metric>_std`; with `against`
            also `num_pairs` and, for top1 and few, `<metric>_diff` and `<metric>_diff_std`.
        methods: in the order of a legend.
        against: the method that differences are to.
    """

    split: Split
    runs: list[Run]
    students: list[Row]
    cells: list[Row]
    methods: list[str | None]
    against: str | None = None


def compare_runs(
    run_dirs: Sequence[Path], *, split: Split = "test", against: str | None = None
) -> Comparison:
    """Compare the methods of one or several runs.

    Runs on the same data with the same settings are read as one: their seeds are averaged together.

    Args:
        run_dirs: run directories, each once.
        split: `test` reads evaluation.json, `val` the last val row of each finished student.
        against: a method; also give the differences to it, paired by seed.
    Returns:
        The comparison; a student that failed or was not evaluated is counted in its cell's state.
    Raises:
        RunError: no run directory, one given twice, or one without any student evaluated on that split.
        ConfigError: `against` is no method of these runs.
    """
    resolved = [folder.resolve() for folder in run_dirs]
    twice = [folder for folder, num in Counter(resolved).items() if num > 1]
    if twice:
        raise RunError(f"{twice[0]} is given twice; name each run directory once")
    comparison = compare([read_run(folder) for folder in run_dirs], split=split, against=against)
    _require_evaluated(comparison)
    return comparison


def compare(runs: Sequence[Run], *, split: Split = "test", against: str | None = None) -> Comparison:
    """Compare the methods of runs that have been read, evaluated or not; see `compare_runs`."""
    labels = dataset_labels(runs)
    rows = _one_teacher_each([row for run in runs for row in _rows_of_run(run, labels[str(run.path)], split)])
    methods = list(dict.fromkeys(row["method"] for run in runs for row in _in_order(run, rows)))
    if against is not None and against not in methods:
        names = [str(method) for method in methods if method is not None]
        near = difflib.get_close_matches(against, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--against {against}: no such method; {hint}these runs have {', '.join(names)}")
    students = [row for row in rows if row["role"] == "student"]
    cells = _cells(rows, methods)
    if against is not None:
        cells = [{**cell, **paired_difference(students, cell, against)} for cell in cells]
    return Comparison(split, list(runs), students, cells, methods, against)


def paired_difference(students: Sequence[Row], cell: Row, against: str) -> Row:
    """What a cell's method gains over another with the same seed, data and model.

        d_i = x_i - y_i over the seeds i that both have;  mean(d) and its sample standard deviation

    Pairs share what the seed decides (the order of samples, and for one model its first weights), so that the
    spread of differences is not the sum of two spreads.

    Returns:
        `num_pairs, top1_diff, top1_diff_std, few_diff, few_diff_std`; None for the method itself.
    """
    found: Row = {"num_pairs": None}
    found |= {f"{key}_diff{end}": None for key in DIFFERENCES for end in ("", "_std")}
    if cell["role"] == "teacher" or cell["method"] == against:
        return found
    same = [row for row in students if all(row[key] == cell[key] for key in ("dataset", "model"))]
    own = {row["seed"]: row for row in same if row["method"] == cell["method"] and row["evaluated"]}
    other = {row["seed"]: row for row in same if row["method"] == against and row["evaluated"]}
    pairs = [(own[seed], other[seed]) for seed in own if seed in other]
    found["num_pairs"] = len(pairs)
    for key in DIFFERENCES:
        known = [(x[key], y[key]) for x, y in pairs if x[key] is not None and y[key] is not None]
        found[f"{key}_diff"], found[f"{key}_diff_std"] = mean_and_std([x - y for x, y in known])
    return found


def clear_best(cells: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """Find what may be called best: for one data set, model and metric, a lead that the spread does not explain.

    A method leads if its mean is better than that of every other method by more than its own and by more than
    the other's standard deviation. With one seed no spread is known, and nothing is claimed.

    Returns:
        (data set, model, metric) -> the leading cell; no entry where none leads. ECE is better when lower.

    Example:
        >>> same = {"role": "student", "dataset": "d", "model": "m"} | dict.fromkeys(METRICS)
        >>> a = {**same, "method": "a", "few": 0.30, "few_std": 0.01}
        >>> b = {**same, "method": "b", "few": 0.35, "few_std": 0.02}
        >>> [cell["method"] for cell in clear_best([a, b]).values()]
        ['b']
        >>> clear_best([a, {**b, "few_std": 0.06}])
        {}
    """
    blocks: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for cell in cells:
        if cell["role"] == "student":
            blocks[(cell["dataset"], cell["model"])].append(cell)
    best = {}
    for block, members in blocks.items():
        for key in METRICS:
            leading = _leader(members, key) if key != "agreement" else None
            if leading is not None:
                best[(*block, key)] = leading
    return best


def _leader(cells: Sequence[Row], key: str) -> Row | None:
    known = [cell for cell in cells if cell[key] is not None]
    if len(known) < 2 or any(cell[f"{key}_std"] is None for cell in known):
        return None
    sign = -1.0 if key == "ece" else 1.0
    first = max(known, key=lambda cell: sign * cell[key])
    others = [cell for cell in known if cell is not first]
    clear = all(
        sign * (first[key] - cell[key]) > max(first[f"{key}_std"], cell[f"{key}_std"]) for cell in others
    )
    return first if clear else None


def imbalance_rows(comparison: Comparison) -> list[Row]:
    """Cells of data sets that come with several imbalance ratios, each ratio once; empty where there are none."""
    labels: dict[str, dict[float, set[str]]] = defaultdict(lambda: defaultdict(set))
    for cell in comparison.cells:
        if cell["imbalance_ratio"] is not None:
            labels[cell["dataset_name"]][cell["imbalance_ratio"]].add(cell["dataset"])
    drawn = {
        name
        for name, ratios in labels.items()
        if len(ratios) > 1 and all(len(own) == 1 for own in ratios.values())
    }
    return [cell for cell in comparison.cells if cell["dataset_name"] in drawn]


def csv_rows(cells: Sequence[Row]) -> list[Row]:
    """Cells under the names that comparison.csv has: `<metric>_mean` beside `<metric>_std`, the teacher as a method.

    Example:
        >>> csv_rows([{"role": "teacher", "method": None, "top1": 0.5, "top1_std": None}])
        [{'role': 'teacher', 'method': 'teacher', 'top1_mean': 0.5, 'top1_std': None}]
    """
    means = {*METRICS, *(f"{key}_diff" for key in DIFFERENCES)}
    named = [{f"{key}_mean" if key in means else key: value for key, value in cell.items()} for cell in cells]
    return [{**row, "method": "teacher"} if row["role"] == "teacher" else row for row in named]


def figure_rows(cells: Sequence[Row]) -> list[Row]:
    """Turn cells into rows that `figures.draw_groups` and `cost_figure.draw_costs` draw (overall = top-1)."""
    return [
        {
            **cell,
            "name": "teacher" if cell["role"] == "teacher" else f"{cell['method']}, {cell['model']}",
            "status": cell["state"] or "finished",
            "overall": cell["top1"],
            "overall_std": cell["top1_std"],
        }
        for cell in cells
    ]


def _cells(rows: Sequence[Row], methods: Sequence[str | None]) -> list[Row]:
    members: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        members[(row["dataset"], row["role"], row["method"], row["model"])].append(row)
    cells = []
    for mean in mean_over_seeds(rows, METRICS, along=["dataset"]):
        own = members[(mean["dataset"], mean["role"], mean["method"], mean["model"])]
        cost = {key: next((row[key] for row in own if row[key] is not None), None) for key in COST}
        states = [
            "not evaluated" if row["status"] in ("finished", "tested") else row["status"]
            for row in own
            if not row["evaluated"]
        ]
        cells.append(
            {
                **{key: mean[key] for key in ("dataset", "dataset_name", "imbalance_ratio", "role")},
                **{key: mean[key] for key in ("method", "model")},
                "num_seeds": mean["num_seeds"],
                "num_students": len(own) if mean["role"] == "student" else None,
                "seeds": mean["seed"],
                "state": state_of([*states, *["finished"] * (len(own) - len(states))]),
                **cost,
                **{key + end: mean[key + end] for key in METRICS for end in ("", "_std")},
            }
        )
    order = {cell["dataset"]: (cell["dataset_name"], cell["imbalance_ratio"] or 0.0) for cell in cells}
    datasets = sorted(order, key=lambda label: (*order[label], label))
    return [cell for label in datasets for cell in _sorted_block(cells, label, methods)]


def _one_teacher_each(rows: Sequence[Row]) -> list[Row]:
    """Drop the teachers of runs that are read as one, all but the first: they are the same teacher."""
    first: dict[str, Row] = {}
    for row in sorted(
        (row for row in rows if row["role"] == "teacher"), key=lambda row: not row["evaluated"]
    ):
        first.setdefault(row["dataset"], row)
    return [row for row in rows if row["role"] == "student" or row is first[row["dataset"]]]


def _sorted_block(cells: Sequence[Row], dataset: str, methods: Sequence[str | None]) -> list[Row]:
    own = [cell for cell in cells if cell["dataset"] == dataset]
    students = [{**cell, "seed": 0} for cell in own if cell["role"] == "student"]
    ordered = in_comparison_order(students, methods)
    teachers = [cell for cell in own if cell["role"] == "teacher"]
    return teachers + [{key: value for key, value in cell.items() if key != "seed"} for cell in ordered]


def _rows_of_run(run: Run, label: str, split: Split) -> list[Row]:
    """One row a model of a run, with its figures on the split; a model that has none keeps its row."""
    methods = methods_of(run)
    val = {student.name: last_rows(student.rows, "val") for student in run.students}
    rows = []
    for row in headline_rows(run):
        figures = row
        if split == "val":
            ended = val[row["name"]] if row["role"] == "student" and row["status"] == "finished" else []
            figures = ended[-1] if ended else {}
        rows.append(
            {
                "dataset": label,
                "dataset_name": str(run.dataset["name"]),
                "imbalance_ratio": imbalance_ratio(run),
                "run": str(run.path),
                "name": row["name"],
                "role": row["role"],
                "method": methods[row["name"]] if row["role"] == "student" else None,
                "model": row["model"],
                "seed": row["seed"],
                "status": row["status"],
                "error": row["error"],
                "evaluated": figures.get("top1") is not None,
                **{key: row[key] for key in COST},
                **{key: figures.get(key) for key in METRICS},
            }
        )
    return rows


def _require_evaluated(comparison: Comparison) -> None:
    for run in comparison.runs:
        own = [row for row in comparison.students if row["run"] == str(run.path)]
        if any(row["evaluated"] for row in own):
            continue
        remedy = (
            f"`krd evaluate {run.path}` evaluates those that have finished; `--split val` compares on val"
            if comparison.split == "test"
            else "that needs a val split and students that have finished; `--split test` compares on test"
        )
        raise RunError(f"{run.path}: no student is evaluated on the {comparison.split} split; {remedy}")


def _in_order(run: Run, rows: Sequence[Row]) -> list[Row]:
    """A run's student rows in the order of its settings."""
    place = {name: index for index, name in enumerate(methods_of(run))}
    own = [row for row in rows if row["run"] == str(run.path) and row["role"] == "student"]
    return sorted(own, key=lambda row: place[row["name"]])
