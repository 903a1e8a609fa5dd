"""Answers how students train at the same time: one Ray Train run each, started together, failing alone.

Does not prepare data or teacher (`run` does).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from krd_ray.config import Resources
from krd_ray.models.registry import describe_model
from krd_ray.storage.places import Folder
from krd_ray.train.lean_trainer import LeanTrainer
from krd_ray.train.loop import WorkerSpec, train_worker
from krd_ray.train.rundir import StudentDir, num_restarts, read_json, seconds_trained, write_json


class StudentRun:
    """One student's Ray Train run in a thread of the driver; the driver holds references, never data.

    Args:
        spec: for its workers.
        workers: number of data-parallel workers.
        resources: of each worker.
        max_failures: restarts of its workers before it fails.
        outlives_driver: the cluster goes on when the driver dies.
        sync: makes the driver's folder and the one that workers write to equal, where they are two.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        resources: Resources,
        max_failures: int,
        *,
        outlives_driver: bool,
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self._sync = sync
        self.name, self.folder = spec.student, StudentDir(Path(spec.folder))
        self._spec = spec
        self._trainer = _trainer(spec, workers, resources, max_failures, outlives_driver)
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"student-{self.name}", daemon=True)

    def start(self) -> None:
        """Begins training in the background."""
        self.folder.error.unlink(missing_ok=True)
        self.folder.stop.unlink(missing_ok=True)
        self.folder.weights.unlink(missing_ok=True)
        write_json(self.folder.result, summarise(self._spec, "started", None))
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
        return dict(read_json(self.folder.result))

    def _run(self) -> None:
        """Trains and writes result.json as soon as this student has ended, whatever the others do."""
        error = self._fit()
        ended = "failed" if error else "finished" if self.folder.weights.is_file() else "stopped"
        write_json(self.folder.result, summarise(self._spec, ended, error))
        self._ended = ended

    def _fit(self) -> str | None:
        """Returns None when the student has trained to its end or was asked to stop, else what went wrong."""
        try:
            try:
                self._trainer.fit()
            finally:
                self._sync()
        except ray.train.TrainingFailedError as error:
            failure: str | None = _first_cause(error)
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


@dataclass
class _NoProcessGroup(TorchConfig):
    """For a student of one worker: nobody to exchange gradients with, and no threads that wait for somebody."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def _trainer(
    spec: WorkerSpec, workers: int, resources: Resources, max_failures: int, outlives_driver: bool
) -> LeanTrainer:
    gpu = resources.num_gpus > 0
    checkpoints = Folder.at(spec.place or spec.folder)
    return LeanTrainer(
        outlives_driver=outlives_driver,
        train_loop_per_worker=train_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=resources.as_ray()
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo") if workers > 1 else _NoProcessGroup(),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.system,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _first_cause(error: ray.train.TrainingFailedError) -> str:
    """The innermost line of what the workers raised."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return f"rank {rank}: {lines[-1]}"
    return str(error).strip().splitlines()[-1]
