"""Answers what Ray costs when it is used as it comes to mind first: the driver hands every tensor on by value (B4).

Does not use krd_ray's stream, store or client.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.speed.cells import COOL_DOWN_EPOCHS, Cell
from benchmarks.speed.setting import Data, Learner, load_teacher
from krd_ray.maths.views import ViewSpec, train_view


@ray.remote(num_cpus=0.2)
class Teacher:
    def __init__(self, root: str, cell: Cell, num_classes: int) -> None:
        torch.set_num_threads(1)
        self._net = load_teacher(Path(root), cell, num_classes)

    def forward(self, images: Any, ids: Any, view_index: int, view: ViewSpec) -> Any:
        with torch.inference_mode():
            pixels = train_view(
                torch.from_numpy(np.array(images)), torch.from_numpy(np.array(ids)), view_index, view
            )
            return self._net(pixels)[0].numpy()

    def cpu_s(self) -> float:
        return time.process_time()


@ray.remote(num_cpus=0.2)
class Student:
    def __init__(self, cell: Cell, num_classes: int, seed: int) -> None:
        torch.set_num_threads(1)
        self._learner = Learner(cell, num_classes, seed)

    def step(
        self, images: Any, ids: Any, labels: Any, logits: Any, view_index: int, view: ViewSpec, counts: Any
    ) -> None:
        pixels = train_view(
            torch.from_numpy(np.array(images)), torch.from_numpy(np.array(ids)), view_index, view
        )
        targets = torch.from_numpy(np.array(logits))
        self._learner.step(
            pixels, torch.from_numpy(np.array(labels)), targets, torch.from_numpy(np.array(counts))
        )

    def cpu_s(self) -> float:
        return time.process_time()


def naive_epochs(root: Path, cell: Cell) -> list[dict[str, float]]:
    """CPU seconds of driver, teacher and students, and wall seconds, of each epoch; Ray is connected already."""
    data = Data.load(root, cell)
    counts = data.class_counts.numpy()
    teacher = Teacher.remote(str(root), cell, len(counts))
    students = [Student.remote(cell, len(counts), k) for k in range(cell.num_students)]
    actors = [teacher, *students]

    def spent() -> float:
        return time.process_time() + sum(ray.get([actor.cpu_s.remote() for actor in actors]))

    costs = []
    for epoch in range(cell.epochs - COOL_DOWN_EPOCHS):  # nothing works ahead here
        cpu, wall = spent(), time.perf_counter()
        for places in data.batches(epoch, 0):
            images, ids = data.rows.images_BHWC[places], data.rows.sample_ids[places]
            logits = ray.get(teacher.forward.remote(images, ids, epoch, data.view))
            labels = data.rows.labels[places]
            ray.get([s.step.remote(images, ids, labels, logits, epoch, data.view, counts) for s in students])
        costs.append({"cpu_s": spent() - cpu, "wall_s": time.perf_counter() - wall})
    for actor in actors:
        ray.kill(actor)
    return costs
