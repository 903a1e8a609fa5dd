"""Answers what the speed benchmark measures: which teacher teaches how many of which students, on which machine.

Does not run anything.
"""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP_EPOCHS = 1
COOL_DOWN_EPOCHS = 1  # a served teacher works ahead, and has done part of the last epoch before it begins


@dataclass(frozen=True)
class Machine:
    """What all contenders of a cell compute on, and with.

    Args:
        device: `cpu` or `cuda`.
        side, images: of the training images, in pixels; None: scikit-learn's digits, else so many of noise.
        batch, micro_batch: of the students and of the teacher.
        resources: that each process of a run reserves.
        num_cpus: of the cluster.
        cost: what an epoch costs: `cpu_s`, or `wall_s` where one card does all the work.
        copies: of a plain contender at the same time, so that all cores are as busy as in a run of several
            processes.
        precision: of students and teacher.
        compile: of the teacher.
        store_bytes: of its memory; more than all targets of a run take.
    """

    device: str
    side: int
    images: int | None
    batch: int
    micro_batch: int
    resources: dict[str, float]
    num_cpus: int
    cost: str
    copies: int
    precision: str
    compile: str
    store_bytes: int


MACHINES = {
    "cpu": Machine(
        device="cpu",
        side=32,
        images=None,
        batch=128,
        micro_batch=64,
        resources={"num_cpus": 0.2},
        num_cpus=2,
        cost="cpu_s",
        copies=2,
        precision="fp32",
        compile="off",
        store_bytes=64 << 20,
    ),
    "gpu": Machine(
        device="cuda",
        side=224,
        images=2048,
        batch=128,
        micro_batch=128,
        resources={"num_cpus": 1, "num_gpus": 0.1},
        num_cpus=16,
        cost="wall_s",
        copies=1,
        precision="bf16",
        compile="cuda_graph",
        store_bytes=1 << 30,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Args:
        teacher, student: model names; all students of a cell are alike.
        num_students: N.
        cycle: number of different views; None: a new one each epoch.
        placement: of the teacher.
        per_process: students that share a process.
        epochs: of each run, the first of which warms up; the last one does not count either.
        rounds: runs, each between two measurements of the plain contenders.
        on: machine.
    """

    teacher: str
    student: str
    num_students: int
    cycle: int | None = None
    placement: str = "actors"
    per_process: int = 1
    epochs: int = WARM_UP_EPOCHS + 2 + COOL_DOWN_EPOCHS
    rounds: int = 5
    on: str = "cpu"

    @property
    def machine(self) -> Machine:
        return MACHINES[self.on]

    @property
    def is_one_process(self) -> bool:
        """All that computes in a run of krd_ray is in one process."""
        return self.placement != "actors" and self.per_process >= self.num_students


# On one thread a forward of resnet8x4, resnet20 costs about 4 times, as much as a step of resnet8; a forward of
# resnet8x4 about 16 times a step of resnet8_w4. The measured ratio stands in the table.
CELLS: dict[str, Cell] = {
    "n1-ratio4": Cell("resnet8x4", "resnet8", 1),
    "n4-ratio4": Cell("resnet8x4", "resnet8", 4),
    "n8-ratio4": Cell("resnet8x4", "resnet8", 8),
    "n4-ratio16": Cell("resnet8x4", "resnet8_w4", 4),
    "n2-ratio4": Cell("resnet8x4", "resnet8", 2),
    "n4-ratio1": Cell("resnet20", "resnet8", 4),
    "n4-ratio4-views4": Cell("resnet8x4", "resnet8", 4, cycle=4, epochs=8, rounds=3),
    "n1-ratio4-in-process": Cell("resnet8x4", "resnet8", 1, placement="in_process"),
    "n4-ratio4-shared": Cell("resnet8x4", "resnet8", 4, per_process=4),
    "n4-ratio4-shared-in-process": Cell("resnet8x4", "resnet8", 4, placement="in_process", per_process=4),
    "n2-ratio4-shared": Cell("resnet8x4", "resnet8", 2, per_process=2),
    "n4-ratio1-shared": Cell("resnet20", "resnet8", 4, per_process=4),
    "n8-ratio4-shared": Cell("resnet8x4", "resnet8", 8, per_process=8),
    "n4-ratio16-shared": Cell("resnet8x4", "resnet8_w4", 4, per_process=4),
    "n1-ratio4-stored": Cell("resnet8x4", "resnet8", 1, cycle=2, placement="stored", epochs=WARM_UP_EPOCHS + 5),
    "n2-20-epochs": Cell("resnet20", "resnet8_w4", 2, epochs=WARM_UP_EPOCHS + 21, rounds=1),
    **{
        f"gpu-n{n}": Cell(
            "torchvision:convnext_base", "torchvision:resnet18", n, epochs=WARM_UP_EPOCHS + 5, rounds=1, on="gpu"
        )
        for n in (1, 2, 4, 8)
    },
    **{
        f"gpu-n{n}-shared": Cell(
            "torchvision:convnext_base", "torchvision:resnet18", n, placement="in_process", per_process=n,
            epochs=WARM_UP_EPOCHS + 5, rounds=1, on="gpu",
        )
        for n in (2, 4, 8)
    },
}  # fmt: skip
