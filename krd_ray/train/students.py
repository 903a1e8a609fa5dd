"""Answers how students train at the same time: one Ray Train run per process, started together, failing alone.

Does not prepare data or teacher (`run` does), and does not start processes (`launch` does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray.exceptions
import ray.train

from krd_ray.config import Resources
from krd_ray.config_resources import Strategy
from krd_ray.errors import DiskFullError
from krd_ray.models.registry import describe_model
from krd_ray.train.launch import first_cause, train_students
from krd_ray.train.rundir import StudentDir, num_restarts, read_json, seconds_trained, write_json
from krd_ray.train.worker_spec import WorkerSpec


class StudentsRun:
    """Students of one process in one Ray Train run, in a thread of the driver, which holds references, never data.

    Args:
        specs: of the students, for their workers; one at least.
        workers: number of data-parallel workers.
        resources: of each worker.
        max_failures: restarts of the workers before what has not ended has failed.
        strategy: how the workers are laid on nodes.
        sync: makes the driver's folder and the one that workers write to equal, where they are two.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        workers: int,
        resources: Resources,
        max_failures: int,
        *,
        strategy: Strategy = "PACK",
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self._sync = sync
        self._specs, self._workers, self._resources = specs, workers, resources
        self._max_failures, self._strategy = max_failures, strategy
        self._folders = {spec.student: StudentDir(Path(spec.folder)) for spec in specs}
        self._results: dict[str, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._run, name=f"students-{self.names[0]}", daemon=True)

    @property
    def names(self) -> list[str]:
        return list(self._folders)

    def start(self) -> None:
        """Begins training in the background."""
        for spec in self._specs:
            folder = self._folders[spec.student]
            for path in (folder.error, folder.stop, folder.weights):
                path.unlink(missing_ok=True)
            self._results[spec.student] = summarise(spec, "started", None)
            write_json(folder.result, self._results[spec.student])
        self._sync()
        self._thread.start()

    @property
    def state(self) -> str:
        """`waiting`, `training` or `ended`, of all of them together."""
        if self._thread.ident is None:
            return "waiting"
        return "training" if self._thread.is_alive() else "ended"

    def states(self) -> dict[str, str]:
        """Returns `waiting`, `training`, `finished`, `failed` or `stopped` (asked to end early) by student."""
        if self.state != "ended":
            return dict.fromkeys(self.names, self.state)
        ended = {name: self._results[name]["status"] for name in self.names}
        return {name: "failed" if status == "started" else status for name, status in ended.items()}

    def finish(self) -> list[dict[str, Any]]:
        """Waits for the end and returns what each student's result.json says."""
        self._thread.join()
        return [dict(self._results[name]) for name in self.names]

    def _run(self) -> None:
        """Trains and writes each result.json as soon as these students have ended, whatever others do."""
        crash, lost = self._fit()
        for spec in self._specs:
            folder = self._folders[spec.student]
            error = _failure_of(folder, crash, lost)
            ended = "failed" if error else "finished" if folder.weights.is_file() else "stopped"
            result = summarise(spec, ended, error)
            try:
                write_json(folder.result, result)
            except DiskFullError as full:  # the file goes on saying that it has started: it can be resumed
                result |= {"status": "failed", "error": error or full.message}
            self._results[spec.student] = result

    def _fit(self) -> tuple[str | None, str | None]:
        """Returns what ended the workers, and what went wrong with bringing their files here; None: nothing."""
        crash = lost = None
        try:
            train_students(self._specs, self._workers, self._resources, self._strategy, self._max_failures)
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            crash = first_cause(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends these students and no others
            crash = f"{type(error).__name__}: {error}"
        try:
            self._sync()
        except Exception as error:  # noqa: BLE001 - the same
            lost = f"{type(error).__name__}: {error}"
        return crash, lost


def _failure_of(folder: StudentDir, crash: str | None, lost: str | None) -> str | None:
    """What went wrong with one student: its own error, files that did not come, what ended its process; None: it is
    done, or was asked to stop."""
    if folder.error.exists():
        return str(read_json(folder.error)["message"])
    if lost is not None:
        return lost
    if folder.weights.is_file():
        return None
    if crash is None and not folder.stop.exists():
        return "training ended without weights"
    return crash


def run_together(
    runs: Sequence[StudentsRun],
    on_tick: Callable[[dict[str, str]], None],
    tick_s: float,
    *,
    at_once: int | None = None,
) -> None:
    """Trains all students, at most `at_once` at the same time, until each has finished or failed.

    Args:
        runs: started in this order; the next one as soon as there is room for its students, or nobody else trains.
        on_tick: gets the state of every student.
        tick_s: seconds between two looks.
        at_once: number of students; None for all together.
    """
    pause = threading.Event()
    while True:
        for run in runs:
            busy = sum(len(other.names) for other in runs if other.state == "training")
            if run.state == "waiting" and (at_once is None or not busy or busy + len(run.names) <= at_once):
                run.start()
        on_tick({name: state for run in runs for name, state in run.states().items()})
        if all(run.state == "ended" for run in runs):
            return
        pause.wait(tick_s)


def summarise(spec: WorkerSpec, status: str, error: str | None) -> dict[str, Any]:
    """Returns the content of result.json from the rows the student wrote."""
    rows = StudentDir(Path(spec.folder)).rows()
    train = {row["epoch"]: row for row in rows if row["split"] == "train"}
    info = describe_model(spec.model, num_classes=len(spec.class_counts), image_size=spec.view.side)
    waiting = sum(row["wait_targets_s"] + row["wait_data_s"] for row in train.values())
    total = waiting + sum(row["compute_s"] for row in train.values())
    return {
        "student": spec.student,
        "model": spec.model,
        "loss_name": spec.loss.label(),
        "status": status,
        "error": error,
        "epochs_done": len(train),
        "num_params": info.num_params,
        "num_flops": info.num_flops,
        "seconds": seconds_trained(rows),
        "restarts": num_restarts(rows),
        "images_per_s": median([row["images_per_s"] for row in train.values()]) if train else None,
        "wait_frac": waiting / total if total else None,
    }
