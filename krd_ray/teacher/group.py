"""Answers how a teacher comes up: replicas placed, calibrated, tested, and taken down again.

Does not serve (the actors do) and does not start a cluster.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from krd_ray.config import Resources
from krd_ray.config_resources import SoftStrategy
from krd_ray.data.remote_errors import own_error, unwrapped
from krd_ray.data.shard_set import ShardSet
from krd_ray.errors import TeacherError
from krd_ray.storage.node_copies import writing
from krd_ray.storage.places import join
from krd_ray.teacher.replica import Replica, TeacherInfo
from krd_ray.teacher.spec import TeacherSpec

log = logging.getLogger(__name__)
NAMESPACE = "krd_ray"
CLOSE_TIMEOUT_S = 30.0
AGREEMENT_RTOL = 2**-10  # one unit in the last place of float16


class TeacherGroup:
    """Replicas of one teacher; samples are split between them by `sample_id`.

    Ray restarts a replica that dies and repeats the calls it was working on; requests are idempotent.

    Args:
        specs: one per replica, in order.
        resources: what each replica reserves.
        num_callers: workers that will ask at the same time; sets how many requests may wait inside an actor.
        name: prefix of the actors' names in namespace `krd_ray`.
        strategy: how the replicas are laid on nodes.
    """

    def __init__(
        self,
        specs: Sequence[TeacherSpec],
        resources: Resources,
        *,
        num_callers: int,
        name: str,
        strategy: SoftStrategy = "PACK",
    ) -> None:
        self._specs = list(specs)
        self.names = tuple(f"{name}-{k}" for k in range(len(specs)))
        self.replicas = [
            _actor_class(resources, strategy, num_callers)
            .options(name=name, namespace=NAMESPACE)
            .remote(spec)
            for name, spec in zip(self.names, specs, strict=True)
        ]

    def start(self, shards: ShardSet, probe: npt.NDArray[np.uint8], *, min_accuracy: float) -> TeacherInfo:
        """Waits for all replicas, calibrates them and runs the self-test.

        Args:
            shards: the training split, with cached blocks where there are any.
            probe: some images, uint8 [n, side, side, 3], on which replicas must agree.
            min_accuracy: macro accuracy on the training images that the teacher must reach, in [0, 1].
        Returns:
            What replica 0 says of itself, accuracy included.
        Raises:
            TeacherError: a replica does not start, replicas differ, or the accuracy is too low.
        """
        infos = _get_all([replica.info.remote() for replica in self.replicas])
        if any(info.accuracy is None for info in infos):
            parts = [replica.sum_part.remote(shards) for replica in self.replicas]
            _get_all([replica.calibrate.remote(*parts) for replica in self.replicas])
            infos = _get_all([replica.info.remote() for replica in self.replicas])
        agreement = self._agreement(probe)
        self._record(infos, agreement, min_accuracy)
        _check(infos, agreement, min_accuracy)
        first: TeacherInfo = infos[0]
        return first

    def fill(self, shards: ShardSet, views: Sequence[int]) -> int:
        """Computes some views of all samples into the stores, all replicas at work; returns the rows held."""
        return sum(_get_all([replica.fill.remote(shards, views) for replica in self.replicas]))

    def rows_held(self, views: Sequence[int]) -> int:
        """Returns how many rows of some views all stores together hold now."""
        return sum(_get_all([replica.rows_held.remote(views) for replica in self.replicas]))

    def stats(self) -> list[dict[str, Any]]:
        """Returns the counters of each replica's present process."""
        return _get_all([replica.stats.remote() for replica in self.replicas])

    def publish(self) -> None:
        """Takes persistent stores to their URI.

        Raises:
            StorageError: it cannot be written.
        """
        _get_all([replica.publish.remote() for replica in self.replicas])

    def close(self) -> None:
        """Writes the last statistics, frees the stores and ends the processes, even those that no longer answer."""
        try:
            ray.get([replica.close.remote() for replica in self.replicas], timeout=CLOSE_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            why = own_error(error) or str(error).splitlines()[0]
            log.warning("the teacher did not close in order, its last statistics may be missing: %s", why)
        self.kill()

    def kill(self) -> None:
        """Ends the processes at once and gives their resources back."""
        for replica in self.replicas:
            ray.kill(replica, no_restart=True)

    def _agreement(self, probe: npt.NDArray[np.uint8]) -> float:
        """Largest difference between replicas' logits, relative to the largest logit."""
        logits = _get_all([replica.probe.remote(probe) for replica in self.replicas])
        scale = float(np.abs(logits[0]).max()) or 1.0
        return max(float(np.abs(other - logits[0]).max()) / scale for other in logits)

    def _record(self, infos: Sequence[TeacherInfo], agreement: float, min_accuracy: float) -> None:
        record = {
            "teacher_hash": infos[0].teacher_hash,
            "model": infos[0].model,
            "num_classes": infos[0].num_classes,
            "feature_dim": infos[0].feature_dim,
            "train_accuracy_balanced": infos[0].accuracy,
            "min_accuracy": min_accuracy,
            "replica_disagreement_frac": agreement,
            "replicas": [{"pid": info.pid, "device": info.device, "node": info.node} for info in infos],
        }
        with writing(join(self._specs[0].run_dir, "selftest.json")) as path:
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _actor_class(resources: Resources, strategy: SoftStrategy, num_callers: int) -> Any:
    """The actor with places for every caller's window of requests, and two for control calls."""
    options: dict[str, Any] = {
        **resources.actor_options(strategy),
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": num_callers + 2,
    }
    return ray.remote(**options)(Replica)


def _get_all(references: Sequence[Any]) -> list[Any]:
    """The values; a KrdError raised in an actor arrives as itself, not wrapped in Ray's traceback."""
    try:
        with unwrapped():
            return list(ray.get(list(references)))
    except ray.exceptions.ActorDiedError as error:
        raise TeacherError(f"the teacher did not start: {_root_message(error)}") from error


def _root_message(error: Exception) -> str:
    """The line of a start-up traceback that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "krd_ray.errors." in line]
    return named[-1].split("krd_ray.errors.", 1)[1] if named else lines[-1]


def _check(infos: Sequence[TeacherInfo], agreement: float, min_accuracy: float) -> None:
    hashes = {info.teacher_hash for info in infos}
    if len(hashes) > 1:
        raise TeacherError(f"replicas hold different teachers: {', '.join(sorted(hashes))}")
    if agreement > AGREEMENT_RTOL:
        raise TeacherError(
            f"replicas differ by {agreement:.2e} of the largest logit on the same images (at most "
            f"{AGREEMENT_RTOL:.2e} allowed); give all replicas the same hardware and precision"
        )
    check_accuracy(infos[0].accuracy, min_accuracy)


def check_accuracy(accuracy: float | None, min_accuracy: float) -> None:
    """Refuses a teacher that does not know its own training images.

    Raises:
        TeacherError: the macro accuracy on them is below the bound.
    """
    if accuracy is None or accuracy < min_accuracy:
        raise TeacherError(
            f"self-test: the teacher is right on {accuracy:.1%} of its own training images (mean over classes), "
            f"at least {min_accuracy:.1%} is expected; wrong weights, other class order or other preprocessing? "
            "(teacher.min_accuracy changes the bound)"
        )
