"""Answers how students train at the same time: one Ray Train run each, started together, failing alone.

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
from krd_ray.train.launch import first_cause, train_student
from krd_ray.train.loop import WorkerSpec
from krd_ray.train.rundir import StudentDir, num_restarts, read_json, seconds_trained, write_json


class StudentRun:
    """One student's Ray Train run in a thread of the driver; the driver holds references, never data.

    Args:
        spec: for its workers.
        workers: number of data-parallel workers.
        resources: of each worker.
        max_failures: restarts of its workers before it fails.
        strategy: how the workers are laid on nodes.
        sync: makes the driver's folder and the one that workers write to equal, where they are two.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        resources: Resources,
        max_failures: int,
        *,
        strategy: Strategy = "PACK",
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self._sync = sync
        self.name, self.folder = spec.student, StudentDir(Path(spec.folder))
        self._spec, self._workers, self._resources = spec, workers, resources
        self._max_failures, self._strategy = max_failures, strategy
        self._ended: str | None = None
        self._result: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, name=f"student-{self.name}", daemon=True)

    def start(self) -> None:
        """Begins training in the background."""
        self.folder.error.unlink(missing_ok=True)
        self.folder.stop.unlink(missing_ok=True)
        self.folder.weights.unlink(missing_ok=True)
        self._result = summarise(self._spec, "started", None)
        write_json(self.folder.result, self._result)
        self._sync()
        self._thread.start()

    @property
    def state(self) -> str:
        """`waiting`, `training`, `finished`, `failed`, or `stopped` when it was asked to end early."""
        if self._thread.ident is None:
            return "waiting"
        if self._thread.is_alive():
            return "training"
        return self._ended or "failed"

    def finish(self) -> dict[str, Any]:
        """Waits for the end and returns what result.json says."""
        self._thread.join()
        return dict(self._result)

    def _run(self) -> None:
        """Trains and writes result.json as soon as this student has ended, whatever the others do."""
        error = self._fit()
        ended = "failed" if error else "finished" if self.folder.weights.is_file() else "stopped"
        self._result = summarise(self._spec, ended, error)
        try:
            write_json(self.folder.result, self._result)
        except DiskFullError as full:  # the file goes on saying that it has started: it can be resumed
            ended = "failed"
            self._result |= {"status": ended, "error": error or full.message}
        self._ended = ended

    def _fit(self) -> str | None:
        """Returns None when the student has trained to its end or was asked to stop, else what went wrong."""
        try:
            try:
                train_student(self._spec, self._workers, self._resources, self._strategy, self._max_failures)
            finally:
                self._sync()
        except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
            failure: str | None = first_cause(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this student and no other
            failure = f"{type(error).__name__}: {error}"
        else:
            ended = self.folder.weights.is_file() or self.folder.stop.exists()
            failure = None if ended else "training ended without weights"
        if self.folder.error.exists():
            failure = str(read_json(self.folder.error)["message"])
        return failure


def run_together(
    runs: Sequence[StudentRun],
    on_tick: Callable[[dict[str, str]], None],
    tick_s: float,
    *,
    at_once: int | None = None,
) -> None:
    """Trains all students, at most `at_once` at the same time, until each has finished or failed.

    Args:
        runs: started in this order; the next one as soon as another has ended.
        on_tick: gets the state of every student.
        tick_s: seconds between two looks.
        at_once: None for all together.
    """
    pause = threading.Event()
    while True:
        states = [run.state for run in runs]
        room = len(runs) if at_once is None else at_once - states.count("training")
        for run in [run for run in runs if run.state == "waiting"][: max(room, 0)]:
            run.start()
        on_tick({run.name: run.state for run in runs})
        if all(run.state not in ("waiting", "training") for run in runs):
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
