"""Answers how the workers of one process's students start, and start again after a failure.

Does not train (`loop` does). One worker is one process: an actor in which Ray Train runs in its local mode, without
controller, synchronisation actor and placement group, each of which would be a process that wakes a hundred times a
second. Several workers are a Ray Train worker group. The function they run is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from krd_ray.config import Resources
from krd_ray.config_resources import Strategy
from krd_ray.errors import KrdError, StorageError
from krd_ray.storage.places import Folder
from krd_ray.train.loop import train_worker
from krd_ray.train.process_group import NodeProcessGroup
from krd_ray.train.rundir import OF_RAY_TRAIN
from krd_ray.train.worker_spec import WorkerSpec


@ray.remote
class TrainWorker:
    """The process of students that have one worker."""

    def train(self, specs: Sequence[WorkerSpec]) -> None:
        """Trains to the end."""
        TorchTrainer(
            train_worker, train_loop_config={"specs": specs}, scaling_config=ScalingConfig(num_workers=0)
        ).fit()


def train_students(
    specs: Sequence[WorkerSpec], workers: int, resources: Resources, strategy: Strategy, max_failures: int
) -> None:
    """Trains students of one process from their last checkpoints to their ends, on as many workers.

    Args:
        specs: of the students, for the workers.
        workers: number of data-parallel workers.
        resources: of each worker.
        strategy: how they are laid on nodes.
        max_failures: how often all workers start again.
    Raises:
        ray.exceptions.RayError: the process of the one worker has failed more often than that.
        ray.train.TrainingFailedError: the group of workers has.
    """
    if workers == 1:
        _train_alone(specs, resources, strategy, max_failures)
    else:
        _train_group(specs, workers, resources, strategy, max_failures)


def _train_alone(
    specs: Sequence[WorkerSpec], resources: Resources, strategy: Strategy, max_failures: int
) -> None:
    """Every attempt gets a process of its own: after a failure on a GPU the old one may be of no more use.

    An error of ours would only happen again, unless the run's place could not be reached.
    """
    for failures_left in range(max_failures, -1, -1):
        worker = TrainWorker.options(**resources.actor_options(strategy)).remote()  # type: ignore[attr-defined]
        try:
            ray.get(worker.train.remote(specs))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if failures_left == 0 or (isinstance(cause, KrdError) and not isinstance(cause, StorageError)):
                raise
        else:
            return
        finally:
            ray.kill(worker)


def _train_group(
    specs: Sequence[WorkerSpec], workers: int, resources: Resources, strategy: Strategy, max_failures: int
) -> None:
    gpu = resources.num_gpus > 0
    place = Folder.at(specs[0].place or specs[0].folder)
    TorchTrainer(
        train_worker,
        train_loop_config={"specs": specs},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpu,
            resources_per_worker=resources.as_ray(),
            placement_strategy=strategy,
            label_selector=resources.node_labels or None,  # type: ignore[call-arg]  # Ray types the old class
        ),
        torch_config=NodeProcessGroup(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=OF_RAY_TRAIN,
            storage_path=place.path,
            storage_filesystem=place.system,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    ).fit()


def first_cause(error: ray.exceptions.RayError | ray.train.TrainingFailedError) -> str:
    """Returns the innermost line of what the workers raised."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"rank 0: {type(error.cause).__name__}: {error.cause}"
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return f"rank {rank}: {lines[-1]}"
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {first}"
