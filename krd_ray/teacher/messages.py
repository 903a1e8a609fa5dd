"""Answers what a student asks the teacher and what comes back, and counts the bytes each process receives.

Does not compute anything. A teacher that reads the cached shards is sent ids alone; else pixels travel as an object
reference inside the request, and it fetches them only for samples it has no answer for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from krd_ray.maths.rectify import Rectifier

Float16Array = npt.NDArray[np.float16]

# Bytes of payload that this process has received from another one, counted where they are unpickled.
# The driver's own entry ends up in ledger.json and must stay 0.
RECEIVED_BYTES: dict[str, int] = {"pixels": 0, "targets": 0}


@dataclass(frozen=True)
class Pixels:
    """Images of a batch, uint8 [B, side, side, 3], on their way to the teacher."""

    images_BHWC: npt.NDArray[np.uint8]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_receive_pixels, (self.images_BHWC,))


@dataclass(frozen=True)
class TargetRequest:
    """What a student's worker asks for one batch.

    Args:
        student: for messages.
        teacher_hash: the answer must come from exactly this teacher, preprocessing and view spec.
        sample_ids: int64 [B].
        labels: int64 [B].
        view_index: int64 [B], which view of each sample; (view, sample) names an answer and may come twice.
        pixels: `Pixels` or a reference to them, whose rows `rows` belong to `sample_ids`; None: the teacher has them.
        rows: int64 [B].
        rectifier: what to do to the raw outputs before they are sent.
    """

    student: str
    teacher_hash: str
    sample_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    view_index: npt.NDArray[np.int64]
    pixels: Any
    rows: npt.NDArray[np.int64]
    rectifier: Rectifier


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's answer: rows in the order of the request.

    Args:
        sample_ids: int64 [B].
        logits: float16 [B, C], rectified, no temperature; None when not asked for.
        features: float16 [B, D], rectified, of unit length or of the length asked for; None when not asked for.
        rectifier: what was done to them.
        teacher_hash: who answered.
        incarnation: how often the answering process had been restarted.
    """

    sample_ids: npt.NDArray[np.int64]
    logits: Float16Array | None
    features: Float16Array | None
    rectifier: Rectifier
    teacher_hash: str
    incarnation: int

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.logits, self.features) if part is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_receive_targets, tuple(getattr(self, field.name) for field in fields(self)))


def _receive_pixels(images_BHWC: npt.NDArray[np.uint8]) -> Pixels:
    RECEIVED_BYTES["pixels"] += images_BHWC.nbytes
    return Pixels(images_BHWC)


def _receive_targets(*values: Any) -> SoftTargets:
    targets = SoftTargets(*values)
    RECEIVED_BYTES["targets"] += targets.num_bytes
    return targets
