"""Answers on what every contender trains: the same images, views, nets, batches and loss.

Does not train. Speed does not depend on what the images show, so they are scikit-learn's digits at 32 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from benchmarks.speed.cells import BATCH, SIDE, Cell
from krd_ray.config import RunConfig, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.manifest import Manifest
from krd_ray.data.reading import block_arrays
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.models.registry import build_model
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.descent import Descent
from krd_ray.train.objective import StepTargets, objective_terms
from krd_ray.train.student import Student, build_student

LOSS = {"kd": {"weight": 1.0}}
TRAIN = {
    "batch_size": BATCH,
    "lr": 0.05,
    "num_threads": 1,
    "precision": "fp32",
    "channels_last": False,
    "val_every_epochs": 1000,
    "checkpoint_every_epochs": 1000,
}
SHARE = {"num_cpus": 0.2}
STORE_BYTES = 64 << 20  # more than all targets of a run take


def prepare_files(root: Path, teacher: str) -> None:
    """Writes shards and an untrained teacher's weights, if they are not there."""
    folder = root / "shards"
    if not (folder / "dataset.json").is_file():
        options = ShardOptions(store="raw", image_size=SIDE, val_per_class=0, row_group_rows=256)
        write_shards(open_source(SourceSpec(kind="digits")), folder, options)
    if not weights_of(root, teacher).is_file():
        manifest = Manifest.load(folder)
        net = build_model(teacher, num_classes=manifest.num_classes, image_size=SIDE, seed=0)
        mean, std = tuple(manifest.mean), tuple(manifest.std)
        card = ModelCard(teacher, manifest.num_classes, SIDE, mean, std, manifest.content_hash)  # type: ignore[arg-type]
        save_weights(net.state_dict(), card, weights_of(root, teacher))


def weights_of(root: Path, teacher: str) -> Path:
    return root / f"{teacher}.safetensors"


def run_config(root: Path, name: str, cell: Cell, **changes: Any) -> RunConfig:
    """The cell as krd_ray's own config."""
    raw: dict[str, Any] = {
        "name": name,
        "run_dir": str(root / "runs" / name),
        "data": {"dir": str(root / "shards")},
        "views": {"recipe": "pad_crop", "pad": 4, "flip": True, "cycle": cell.cycle},
        "teacher": {
            "weights": str(weights_of(root, cell.teacher)),
            "placement": cell.placement,
            "resources": SHARE,
            "num_threads": 1,
            "micro_batch": BATCH,
            "min_accuracy": 0.0,
            "memory_bytes": STORE_BYTES,
            "persist": cell.placement == "stored",
            "spill_dir": str(root / "store") if cell.placement == "stored" else None,
        },
        "loss": LOSS,
        "train": {**TRAIN, "epochs": cell.epochs},
        "evaluate": False,
        "students": [
            {"name": f"student{k}", "model": cell.student, "resources": SHARE}
            for k in range(cell.num_students)
        ],
    }
    return RunConfig.model_validate({**raw, **changes})


@dataclass(frozen=True)
class Data:
    """The training split in memory, with its view."""

    rows: Batch
    view: ViewSpec
    class_counts: Tensor

    @classmethod
    def load(cls, root: Path) -> Data:
        """Reads the shards with PyArrow, once."""
        folder = root / "shards"
        manifest = Manifest.load(folder)
        files = dict.fromkeys(ShardSet.open(folder, manifest, "train").files)
        parts = [block_arrays(pq.read_table(folder / file), SIDE) for file in files]
        names = ("sample_ids", "labels", "images_BHWC", "view_index")
        rows = Batch(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        mean, std = tuple(manifest.mean), tuple(manifest.std)
        view = ViewSpec("pad_crop", SIDE, 0, mean, std, pad=4, flip=True)  # type: ignore[arg-type]
        return cls(rows, view, torch.tensor(manifest.splits["train"].class_counts))

    def batches(self, epoch: int, seed: int) -> list[np.ndarray[Any, Any]]:
        """Places of an epoch's shuffled batches."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]

    def make_view(self, places: np.ndarray[Any, Any], view_index: int) -> tuple[Tensor, Tensor]:
        """View and labels of a batch."""
        images = torch.from_numpy(self.rows.images_BHWC[places])
        ids = torch.from_numpy(self.rows.sample_ids[places])
        return train_view(images, ids, view_index, self.view), torch.from_numpy(self.rows.labels[places])


class Learner:
    """One student with its optimiser, as a training loop holds it."""

    def __init__(self, model: str, num_classes: int, epochs: int, seed: int) -> None:
        self.loss = LossConfig.model_validate(LOSS)
        self.student: Student = build_student(
            model, num_classes=num_classes, side=SIDE, seed=seed, teacher_dim=None
        )
        self.student.train()
        train = TrainConfig.model_validate({**TRAIN, "epochs": epochs})
        self.descent = Descent(self.student, train, torch.device("cpu"))

    def step(self, view: Tensor, labels: Tensor, teacher_logits: Tensor, class_counts: Tensor) -> None:
        """Forward, loss, backward, update."""
        logits, projected = self.student(view)
        terms = objective_terms(
            self.loss,
            student_logits=logits,
            projected=projected,
            labels=labels,
            class_counts=class_counts,
            class_weights=torch.ones(len(class_counts)),
            targets=StepTargets(teacher_logits, None),
        )
        self.descent.step(terms["loss"])


def load_teacher_net(root: Path, teacher: str, num_classes: int) -> nn.Module:
    """The frozen teacher."""
    return load_model(weights_of(root, teacher), model=None, num_classes=num_classes, image_size=SIDE)[0]
