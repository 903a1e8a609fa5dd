"""Answers on what every contender trains: the same images, views, nets, batches and loss.

Does not train. Speed does not depend on what the images show: they are scikit-learn's digits, or noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.speed.cells import Cell
from krd_ray.config import RunConfig, TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.manifest import Manifest
from krd_ray.data.reading import block_arrays
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.data.shards import write_shards
from krd_ray.data.source_arrays import ArraySource
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.models.registry import build_model
from krd_ray.teacher.recorded import FixedForward, record_forward
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.descent import Descent
from krd_ray.train.objective import StepTargets, objective_terms
from krd_ray.train.student import Student, build_student

LOSS = {"kd": {"weight": 1.0}}
NEVER = 1000  # epochs
CLASSES = 10


def train_settings(cell: Cell) -> dict[str, Any]:
    """The loop's settings, for a config and for a plain loop."""
    machine = cell.machine
    return {
        "epochs": cell.epochs,
        "batch_size": machine.batch,
        "lr": 0.05,
        "num_threads": 1,
        "precision": machine.precision,
        "val_every_epochs": NEVER,
        "checkpoint_every_epochs": NEVER,
    }


def prepare_files(root: Path, cell: Cell) -> None:
    """Writes shards and an untrained teacher's weights, if they are not there."""
    folder, side = shards_of(root, cell), cell.machine.side
    if not (folder / "dataset.json").is_file():
        options = ShardOptions(store="raw", image_size=side, val_per_class=0, row_group_rows=256)
        images = cell.machine.images
        source = _noise(images, side) if images else open_source(SourceSpec(kind="digits"))
        write_shards(source, folder, options)
    if not weights_of(root, cell).is_file():
        manifest = Manifest.load(folder)
        net = build_model(cell.teacher, num_classes=manifest.num_classes, image_size=side, seed=0)
        mean, std = tuple(manifest.mean), tuple(manifest.std)
        card = ModelCard(cell.teacher, manifest.num_classes, side, mean, std, manifest.content_hash)  # type: ignore[arg-type]
        save_weights(net.state_dict(), card, weights_of(root, cell))


def shards_of(root: Path, cell: Cell) -> Path:
    return root / f"shards-{cell.on}"


def weights_of(root: Path, cell: Cell) -> Path:
    return root / f"{cell.teacher.replace(':', '-')}-{cell.on}.safetensors"


def _noise(num_images: int, side: int) -> ArraySource:
    """Images of noise, every class equally often, and one of each for the test split, which nobody reads."""
    draw = np.random.default_rng(0)
    labels = np.arange(num_images) % CLASSES
    images = draw.integers(0, 256, (num_images, side, side, 3), np.uint8)
    names = [str(label) for label in range(CLASSES)]
    return ArraySource("noise", names, images, labels, images[:CLASSES], labels[:CLASSES])


def run_config(root: Path, name: str, cell: Cell, **changes: Any) -> RunConfig:
    """The cell as krd_ray's own config."""
    machine = cell.machine
    raw: dict[str, Any] = {
        "name": name,
        "run_dir": str(root / "runs" / name),
        "data": {"dir": str(shards_of(root, cell))},
        "views": {"recipe": "pad_crop", "pad": 4, "flip": True, "cycle": cell.cycle},
        "teacher": {
            "weights": str(weights_of(root, cell)),
            "placement": cell.placement,
            "resources": machine.resources,
            "num_threads": 1,
            "micro_batch": machine.micro_batch,
            "precision": machine.precision,
            "compile": machine.compile,
            "min_accuracy": 0.0,
            "memory_bytes": machine.store_bytes,
            "persist": cell.placement == "stored",
            "spill_dir": str(root / "store") if cell.placement == "stored" else None,
        },
        "loss": LOSS,
        "train": train_settings(cell),
        "evaluate": False,
        "students_per_process": cell.per_process,
        "students": [
            {"name": f"student{k}", "model": cell.student, "resources": machine.resources}
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
    device: torch.device
    batch: int

    @classmethod
    def load(cls, root: Path, cell: Cell) -> Data:
        """Reads the shards with PyArrow, once."""
        folder, machine = shards_of(root, cell), cell.machine
        manifest = Manifest.load(folder)
        files = dict.fromkeys(ShardSet.open(folder, manifest, "train").files)
        parts = [block_arrays(pq.read_table(folder / file), machine.side) for file in files]
        names = ("sample_ids", "labels", "images_BHWC", "view_index")
        rows = Batch(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        mean, std = tuple(manifest.mean), tuple(manifest.std)
        view = ViewSpec("pad_crop", machine.side, 0, mean, std, pad=4, flip=True)  # type: ignore[arg-type]
        device = torch.device(machine.device)
        counts = torch.tensor(manifest.splits["train"].class_counts, device=device)
        return cls(rows, view, counts, device, machine.batch)

    def batches(self, epoch: int, seed: int) -> list[np.ndarray[Any, Any]]:
        """Places of an epoch's shuffled batches."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]

    def make_view(self, places: np.ndarray[Any, Any], view_index: int) -> tuple[Tensor, Tensor]:
        """View and labels of a batch, on the device."""
        rows = self.rows
        images, ids, labels = (
            on_device(each[places], self.device) for each in (rows.images_BHWC, rows.sample_ids, rows.labels)
        )
        return train_view(images, ids, view_index, self.view), labels


class Learner:
    """One student with its optimiser, as a training loop holds it."""

    def __init__(self, cell: Cell, num_classes: int, seed: int) -> None:
        self.loss, machine = LossConfig.model_validate(LOSS), cell.machine
        built = build_student(
            cell.student, num_classes=num_classes, side=machine.side, seed=seed, teacher_dim=None
        )
        self.student: Student = built.to(machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.student.train()
        train = TrainConfig.model_validate(train_settings(cell))
        self.descent = Descent(self.student, train, torch.device(machine.device))

    def step(self, view: Tensor, labels: Tensor, teacher_logits: Tensor, class_counts: Tensor) -> None:
        """Forward, loss, backward, update."""
        with self.descent.autocast():
            logits, projected = self.student(view)
        terms = objective_terms(
            self.loss,
            student_logits=logits,
            projected=projected,
            labels=labels,
            class_counts=class_counts,
            class_weights=torch.ones(len(class_counts), device=class_counts.device),
            targets=StepTargets(teacher_logits, None),
        )
        self.descent.step(terms["loss"])


def load_teacher(root: Path, cell: Cell, num_classes: int) -> FixedForward:
    """The frozen teacher as krd_ray's own runs it: precision, memory layout and compilation alike."""
    machine, path = cell.machine, weights_of(root, cell)
    net = load_model(path, model=None, num_classes=num_classes, image_size=machine.side)[0]
    net = net.to(machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(machine.device, torch.bfloat16, enabled=machine.precision == "bf16"):
            logits, features = net(view)
        return logits.float(), features

    shape = (machine.micro_batch, 3, machine.side, machine.side)
    return record_forward(forward, shape, torch.device(machine.device), machine.compile)  # type: ignore[arg-type]
