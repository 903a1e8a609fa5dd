"""Answers what training costs without krd_ray's distribution: one process, plain PyTorch, written tightly.

Does not use Ray. Run as a process of its own: `python -m benchmarks.speed.plain CONTENDER ROOT CELL NS EPOCHS SEED`
prints one JSON line: by number of students, CPU and wall seconds of each epoch.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.cells import Cell
from benchmarks.speed.setting import LOSS, Data, Learner, load_teacher
from krd_ray.models.torchvision_import import make_torchvision_importable
from krd_ray.teacher.recorded import FixedForward

Batches = Callable[[int], Iterator[None]]  # trains the batches of an epoch, one by one
WARM_UP_BATCHES = 3
# What timm expects of a student's and a teacher's inputs; the same for both, so that it leaves the view as it is.
PREPARED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Files:
    """What is read once: images in memory, the frozen teacher ready to forward."""

    cell: Cell
    data: Data
    teacher: FixedForward

    @classmethod
    def load(cls, root: Path, cell: Cell) -> Files:
        """Reads both."""
        data = Data.load(root, cell)
        return cls(cell, data, load_teacher(root, cell, len(data.class_counts)))

    @property
    def num_classes(self) -> int:
        return len(self.data.class_counts)

    def finish(self) -> None:
        """Waits until nothing is left in a card's queue."""
        if self.data.device.type == "cuda":
            torch.cuda.synchronize()


def teacher_inside(files: Files, num_students: int, seed: int) -> Batches:
    """B0 (N = 1) and B1: the view and the teacher's forward once per batch, then a step of each student."""
    data, teacher = files.data, files.teacher
    learners = [Learner(files.cell, files.num_classes, k) for k in range(num_students)]

    def run(epoch: int) -> Iterator[None]:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch)
            with torch.inference_mode():
                logits = teacher(view)[0]
            logits = logits.clone()  # out of inference mode
            for learner in learners:
                learner.step(view, labels, logits, data.class_counts)
            yield

    return run


def free_teacher(files: Files, num_students: int, seed: int) -> Batches:
    """B2: the targets of two views lie in memory as float16; the teacher costs nothing."""
    data, num_classes = files.data, files.num_classes
    shape = (2, len(data.rows), num_classes)
    targets = torch.empty(shape, dtype=torch.float16, device=data.device)
    with torch.inference_mode():
        for index, rows in enumerate(targets):
            for places in data.batches(0, seed):
                rows[torch.from_numpy(places)] = files.teacher(data.make_view(places, index)[0])[0].half()
    learners = [Learner(files.cell, num_classes, k) for k in range(num_students)]

    def run(epoch: int) -> Iterator[None]:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch % 2)
            logits = targets[epoch % 2][torch.from_numpy(places)]
            for learner in learners:
                learner.step(view, labels, logits, data.class_counts)
            yield

    return run


class _Logits(nn.Module):
    """A network without its features, as timm expects one."""

    def __init__(self, net: FixedForward, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes, self.in_chans, self.pretrained_cfg = net, num_classes, 3, PREPARED

    def forward(self, view: Tensor) -> Tensor:
        logits: Tensor = self.net(view)[0]
        return logits


def timm_task(files: Files, num_students: int, seed: int) -> Batches:
    """timm's logit distillation task on the same views and nets; one student, as it has one."""
    make_torchvision_importable()  # before timm imports it
    from timm.task import LogitDistillationTask

    del num_students
    data, num_classes = files.data, files.num_classes
    learner = Learner(files.cell, num_classes, 0)
    task = LogitDistillationTask(
        student_model=_Logits(learner.student.net, num_classes),
        teacher_model=_Logits(files.teacher, num_classes),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1.0,
        distill_loss_weight=float(LOSS["kd"]["weight"]),
        temperature=4.0,
        verbose=False,
    )

    def run(epoch: int) -> Iterator[None]:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch)
            with learner.descent.autocast():
                loss = task(view, labels)["loss"]
            learner.descent.step(loss)
            yield

    return run


CONTENDERS = {"inside": teacher_inside, "free": free_teacher, "timm": timm_task}


def main(contender: str, root: str, cell: str, nums: str, epochs: str, seed: str) -> None:
    """For each number of students: some batches to warm up, then the epochs; prints what these cost."""
    torch.set_num_threads(1)
    files = Files.load(Path(root), Cell(**json.loads(cell)))
    costs: dict[int, list[dict[str, float]]] = {}
    for num in json.loads(nums):
        run, costs[num] = CONTENDERS[contender](files, num, int(seed)), []
        for _ in itertools.islice(run(0), WARM_UP_BATCHES):
            files.finish()
        for epoch in range(int(epochs)):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in run(epoch):
                pass
            files.finish()
            costs[num].append({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})
    print(json.dumps(costs))


if __name__ == "__main__":
    main(*sys.argv[1:])
