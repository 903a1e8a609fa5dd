"""Answers what the teacher's classes look like: one pass over the training shards, each class weighing the same.

Does not choose between replicas and does no Ray calls; each replica sums its part, the parts are added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krd_ray.data.shard_set import Batch
from krd_ray.errors import TeacherError
from krd_ray.maths.calibration import Calibration
from krd_ray.storage.node_copies import exists, node_file, writing
from krd_ray.teacher.forward import TeacherForward


@dataclass(frozen=True)
class ClassSums:
    """Sums over a part of the training split: features [C, D] float64, samples and correct answers [C] int64."""

    features: npt.NDArray[np.float64]
    samples: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.features + other.features, self.samples + other.samples, self.correct + other.correct
        )

    @property
    def accuracy(self) -> float:
        """Macro accuracy on the training images without augmentation, in [0, 1]."""
        present = self.samples > 0
        return float((self.correct[present] / self.samples[present]).mean())


def sum_classes(
    forward: TeacherForward, batches: Iterable[Batch], num_classes: int, feature_dim: int
) -> ClassSums:
    """Sums the teacher's features per class over the batches; eval view."""
    features = np.zeros((num_classes, feature_dim))
    samples = np.zeros(num_classes, np.int64)
    correct = np.zeros(num_classes, np.int64)
    for batch in batches:
        batch_logits, batch_features = forward.on_eval_view(batch.images_BHWC)
        np.add.at(features, batch.labels, batch_features.double().numpy())
        np.add.at(samples, batch.labels, 1)
        np.add.at(
            correct, batch.labels, (batch_logits.argmax(dim=1).numpy() == batch.labels).astype(np.int64)
        )
    return ClassSums(features, samples, correct)


def calibration_from(parts: Sequence[ClassSums], class_counts: Sequence[int]) -> tuple[Calibration, float]:
    """Returns class means with balanced priors, and the teacher's macro training accuracy.

    Raises:
        TeacherError: the samples counted are not those the manifest promises.
    """
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if total.samples.tolist() != list(class_counts):
        wrong = int(np.flatnonzero(total.samples != np.asarray(class_counts))[0])
        raise TeacherError(
            f"calibration saw {total.samples[wrong]} images of class {wrong}, dataset.json says "
            f"{class_counts[wrong]}; write the shards again with `krd shards`"
        )
    means = torch.from_numpy(total.features / total.samples[:, None]).float()
    return Calibration.from_means(means, torch.tensor(list(class_counts))), total.accuracy


def save_calibration(calibration: Calibration, teacher_hash: str, accuracy: float, place: str | Path) -> None:
    """Writes the calibration beside the run, atomically, so that a restarted replica need not repeat the pass."""
    header = {"krd_ray": json.dumps({"teacher_hash": teacher_hash, "accuracy": accuracy})}
    with writing(str(place)) as path:
        save_file({key: value.contiguous() for key, value in calibration.to_dict().items()}, path, header)


def load_calibration(place: str | Path, teacher_hash: str) -> tuple[Calibration, float] | None:
    """Returns the calibration of exactly this teacher, or None where there is none."""
    if not exists(str(place)):
        return None
    path = node_file(str(place))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["krd_ray"])
    if header["teacher_hash"] != teacher_hash:
        return None
    return Calibration.from_dict(load_file(path)), float(header["accuracy"])
