"""Answers how the teacher and the students of a finished run do on the test split, which is read once.

Does not train or select: the weights are those of each student's last epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from krd_ray.config_io import load_config
from krd_ray.data.shard_set import ShardSet
from krd_ray.errors import DataError, RunError
from krd_ray.train.cluster import connected
from krd_ray.train.evaluate import evaluate_and_time
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.rundir import RunDir, open_run, read_json, write_json


def evaluate_run(place: str | Path, *, again: bool = False) -> dict[str, Any]:
    """Evaluates a run on the test split and writes evaluation.json; a second call returns what the first wrote.

    Args:
        place: path or URI of the run directory.
        again: read the test split once more, for a run whose weights have changed (a resumed one).
    Returns:
        The content of evaluation.json.
    Raises:
        RunError: no student has finished.
        DataError: the dataset has no test split.
    """
    with open_run(place) as run:
        return _evaluate(run, again=again)


def _evaluate(run: RunDir, *, again: bool) -> dict[str, Any]:
    run.require()
    if run.evaluation.is_file() and not again:
        return dict(read_json(run.evaluation))
    prepared = prepare(load_config(run.config))
    models = _models(prepared, run)
    if "test" not in prepared.manifest.splits:
        raise DataError(f"{prepared.config.data.dir} has no test split to evaluate on")
    test = ShardSet.open(prepared.config.data.dir, prepared.manifest, "test", side=prepared.train.side)
    with connected(prepared.config.ray):
        num_gpus = _gpus(prepared)
        remote: Any = ray.remote(num_cpus=0.25, num_gpus=num_gpus)
        taught_by = "teacher" if prepared.config.teacher else None
        results = ray.get(
            remote(evaluate_and_time).remote(
                models,
                test,
                prepared.view,
                prepared.class_counts,
                teacher=taught_by,
                device="cuda" if num_gpus else "cpu",
            )
        )
    evaluation = {"split": "test", "num_samples": test.num_rows, **results}
    write_json(run.evaluation, evaluation)
    return evaluation


def _models(prepared: Prepared, run: RunDir) -> dict[str, dict[str, Any]]:
    config = prepared.config
    finished = {
        student.name: {"weights": run.place_of(run.student(student.name).weights), "model": student.model}
        for student in config.students
        if run.student(student.name).weights.is_file()
    }
    if not finished:
        raise RunError(f"{run.place}: no student has finished, there is nothing to evaluate")
    if config.teacher is None:
        return finished
    return {"teacher": {"weights": config.teacher.weights, "model": config.teacher.model}, **finished}


def _gpus(prepared: Prepared) -> float:
    """The largest share of a GPU that a process of the run had, for the evaluation."""
    config = prepared.config
    resources = [student.resources for student in config.students]
    resources += [config.teacher.resources] if config.teacher else []
    return min(max(each.num_gpus for each in resources), 1.0)
