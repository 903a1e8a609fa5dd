"""Answers what the speed benchmark measures: which teacher teaches which students, how many, from which views.

Does not run anything.
"""

from __future__ import annotations

from dataclasses import dataclass

SIDE = 32
BATCH = 128
WARM_UP_EPOCHS = 1


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Args:
        teacher, student: model names; all students of a cell are alike.
        num_students: N.
        cycle: number of different views; None: a new one each epoch.
        placement: of the teacher.
        epochs: of the run, the first of which warms up.
    """

    teacher: str
    student: str
    num_students: int
    cycle: int | None = None
    placement: str = "actors"
    epochs: int = WARM_UP_EPOCHS + 5


# On one thread a forward of resnet8x4, resnet20 costs about 4 times, as much as a step of resnet8; a forward of
# resnet8x4 about 16 times a step of resnet8_w4. The measured ratio stands in the table.
CELLS: dict[str, Cell] = {
    "n4-ratio4": Cell("resnet8x4", "resnet8", 4),
    "n1-ratio4": Cell("resnet8x4", "resnet8", 1),
    "n1-ratio4-in-process": Cell("resnet8x4", "resnet8", 1, placement="in_process"),
    "n1-ratio4-stored": Cell(
        "resnet8x4", "resnet8", 1, cycle=2, placement="stored", epochs=WARM_UP_EPOCHS + 8
    ),
    "n2-ratio4": Cell("resnet8x4", "resnet8", 2),
    "n8-ratio4": Cell("resnet8x4", "resnet8", 8, epochs=WARM_UP_EPOCHS + 3),
    "n4-ratio1": Cell("resnet20", "resnet8", 4, epochs=WARM_UP_EPOCHS + 3),
    "n4-ratio16": Cell("resnet8x4", "resnet8_w4", 4, epochs=WARM_UP_EPOCHS + 3),
    "n4-ratio4-views4": Cell("resnet8x4", "resnet8", 4, cycle=4, epochs=8),
    "n2-20-epochs": Cell("resnet20", "resnet8_w4", 2, epochs=WARM_UP_EPOCHS + 20),
}
