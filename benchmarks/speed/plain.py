"""Answers what training costs without krd_ray's distribution: one process, plain PyTorch, written tightly.

Does not use Ray. Run as a process of its own: `python -m benchmarks.speed.plain CONTENDER ROOT CELL N EPOCHS SEED`
prints one JSON line: CPU and wall seconds of each epoch.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.cells import Cell
from benchmarks.speed.setting import LOSS, Data, Learner, load_teacher, load_teacher_net
from krd_ray.models.torchvision_import import make_torchvision_importable

Batches = Callable[[int], Iterator[None]]  # trains the batches of an epoch, one by one
WARM_UP_BATCHES = 3
# What timm expects of a student's and a teacher's inputs; the same for both, so that it leaves the view as it is.
PREPARED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def teacher_inside(root: Path, cell: Cell, num_students: int, seed: int) -> Batches:
    """B0 (N = 1) and B1: the view and the teacher's forward once per batch, then a step of each student."""
    data = Data.load(root, cell)
    num_classes = len(data.class_counts)
    teacher = load_teacher(root, cell, num_classes)
    learners = [Learner(cell, num_classes, k) for k in range(num_students)]

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


def free_teacher(root: Path, cell: Cell, num_students: int, seed: int) -> Batches:
    """B2: the targets of two views lie in memory as float16; the teacher costs nothing."""
    data = Data.load(root, cell)
    num_classes = len(data.class_counts)
    teacher = load_teacher(root, cell, num_classes)
    targets = [
        torch.empty(len(data.rows), num_classes, dtype=torch.float16, device=data.device) for _ in range(2)
    ]
    with torch.inference_mode():
        for index, rows in enumerate(targets):
            for places in data.batches(0, seed):
                rows[torch.from_numpy(places)] = teacher(data.make_view(places, index)[0])[0].half()
    learners = [Learner(cell, num_classes, k) for k in range(num_students)]

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

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes, self.in_chans, self.pretrained_cfg = net, num_classes, 3, PREPARED

    def forward(self, view: Tensor) -> Tensor:
        logits: Tensor = self.net(view)[0]
        return logits


def timm_task(root: Path, cell: Cell, num_students: int, seed: int) -> Batches:
    """timm's logit distillation task on the same views and nets; one student, as it has one."""
    make_torchvision_importable()  # before timm imports it
    from timm.task import LogitDistillationTask

    del num_students
    data = Data.load(root, cell)
    num_classes = len(data.class_counts)
    learner = Learner(cell, num_classes, 0)
    task = LogitDistillationTask(
        student_model=_Logits(learner.student.net, num_classes),
        teacher_model=_Logits(load_teacher_net(root, cell, num_classes).to(data.device), num_classes),
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


def main(contender: str, root: str, cell: str, num_students: str, epochs: str, seed: str) -> None:
    """Trains some batches to warm up, then the epochs, and prints what these cost."""
    torch.set_num_threads(1)
    each = Cell(**json.loads(cell))
    run = CONTENDERS[contender](Path(root), each, int(num_students), int(seed))
    for _ in itertools.islice(run(0), WARM_UP_BATCHES):
        _finish(each)
    costs = []
    for epoch in range(int(epochs)):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in run(epoch):
            pass
        _finish(each)
        costs.append({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})
    print(json.dumps(costs))


def _finish(cell: Cell) -> None:
    """Waits until nothing is left in a card's queue."""
    if cell.machine.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
