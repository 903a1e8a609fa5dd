"""Answers what a worker must know of a student that it trains.

Does not train (`loop` and `learner` do).
"""

from __future__ import annotations

from dataclasses import dataclass

from krd_ray.config import TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.shard_set import ShardSet
from krd_ray.maths.views import ViewSpec
from krd_ray.teacher.ports import TeacherLink


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker of one student needs; the same on every rank.

    Args:
        student, model: names.
        train, loss: with the student's own settings laid over the run's; nothing left on `auto`.
        view: of training and evaluation.
        cycle: number of different views per image; None: a new one each epoch.
        train_shards, val_shards: splits, with cached blocks where there are any.
        class_counts: n_c of the training split.
        seed: of weights; shuffle_seed: of the order of samples.
        window_rows: of the shuffle.
        folder: the student's folder in the run directory, as the driver sees it.
        session: how often a driver had started this student before.
        dataset_hash: for the card of the exported weights.
        num_threads: CPU threads of torch.
        teacher: None for a teacher or a baseline.
        place: path or URI by which every node knows the student's folder; None: by the same path.
    """

    student: str
    model: str
    train: TrainConfig
    loss: LossConfig
    view: ViewSpec
    cycle: int | None
    train_shards: ShardSet
    val_shards: ShardSet | None
    class_counts: tuple[int, ...]
    seed: int
    shuffle_seed: int
    window_rows: int
    folder: str
    session: int
    dataset_hash: str
    num_threads: int
    teacher: TeacherLink | None
    place: str | None = None
