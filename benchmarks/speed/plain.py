"""Answers what training costs without krd_ray's distribution: one process, plain PyTorch, written tightly.

Does not use Ray. Run as a process of its own: `python -m benchmarks.speed.plain CONTENDER ROOT TEACHER STUDENT ...`
prints one JSON line: CPU and wall seconds of each epoch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.speed.setting import LOSS, Data, Learner, load_teacher_net
from krd_ray.models.torchvision_import import make_torchvision_importable

Epoch = Callable[[int], None]
# What timm expects of a student's and a teacher's inputs; the same for both, so that it leaves the view as it is.
PREPARED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def teacher_inside(
    root: Path, teacher: str, student: str, num_students: int, epochs: int, seed: int
) -> Epoch:
    """B0 (N = 1) and B1: the view and the teacher's forward once per batch, then a step of each student."""
    data = Data.load(root)
    num_classes = len(data.class_counts)
    net = load_teacher_net(root, teacher, num_classes)
    learners = [Learner(student, num_classes, epochs, k) for k in range(num_students)]

    def run(epoch: int) -> None:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch)
            with torch.inference_mode():
                logits = net(view)[0]
            logits = logits.clone()  # out of inference mode
            for learner in learners:
                learner.step(view, labels, logits, data.class_counts)

    return run


def free_teacher(root: Path, teacher: str, student: str, num_students: int, epochs: int, seed: int) -> Epoch:
    """B2: the targets of two views lie in memory as float16; the teacher costs nothing."""
    data = Data.load(root)
    num_classes = len(data.class_counts)
    net = load_teacher_net(root, teacher, num_classes)
    targets = [torch.empty(len(data.rows), num_classes, dtype=torch.float16) for _ in range(2)]
    with torch.inference_mode():
        for index, rows in enumerate(targets):
            for places in data.batches(0, seed):
                rows[torch.from_numpy(places)] = net(data.make_view(places, index)[0])[0].half()
    learners = [Learner(student, num_classes, epochs, k) for k in range(num_students)]

    def run(epoch: int) -> None:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch % 2)
            logits = targets[epoch % 2][torch.from_numpy(places)]
            for learner in learners:
                learner.step(view, labels, logits, data.class_counts)

    return run


class _Logits(nn.Module):
    """A network without its features, as timm expects one."""

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net, self.num_classes, self.in_chans, self.pretrained_cfg = net, num_classes, 3, PREPARED

    def forward(self, view: Tensor) -> Tensor:
        logits: Tensor = self.net(view)[0]
        return logits


def timm_task(root: Path, teacher: str, student: str, num_students: int, epochs: int, seed: int) -> Epoch:
    """timm's logit distillation task on the same views and nets; one student, as it has one."""
    make_torchvision_importable()  # before timm imports it
    from timm.task import LogitDistillationTask

    del num_students
    data = Data.load(root)
    num_classes = len(data.class_counts)
    learner = Learner(student, num_classes, epochs, 0)
    task = LogitDistillationTask(
        student_model=_Logits(learner.student.net, num_classes),
        teacher_model=_Logits(load_teacher_net(root, teacher, num_classes), num_classes),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=1.0,
        distill_loss_weight=float(LOSS["kd"]["weight"]),
        temperature=4.0,
        verbose=False,
    )

    def run(epoch: int) -> None:
        for places in data.batches(epoch, seed):
            view, labels = data.make_view(places, epoch)
            learner.descent.step(task(view, labels)["loss"])

    return run


CONTENDERS = {"inside": teacher_inside, "free": free_teacher, "timm": timm_task}


def main(
    contender: str, root: str, teacher: str, student: str, num_students: str, epochs: str, seed: str
) -> None:
    """Trains and prints the epochs' costs, the first of which warms up."""
    torch.set_num_threads(1)
    run = CONTENDERS[contender](Path(root), teacher, student, int(num_students), int(epochs), int(seed))
    costs = []
    for epoch in range(int(epochs)):
        wall, cpu = time.perf_counter(), time.process_time()
        run(epoch)
        costs.append({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})
    print(json.dumps(costs))


if __name__ == "__main__":
    main(*sys.argv[1:])
