"""Answers what a student's checkpoint holds, how it is reported and how training goes on from it.

Does not decide when (`loop` does) and keeps none itself: Ray Train moves and counts them.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch

FILE = "state.pt"


@dataclass(frozen=True)
class Position:
    """Where training stands: last finished epoch (-1: none), steps done, balanced accuracy of the last validation."""

    epoch: int = -1
    step: int = 0
    val_balanced: float | None = None


def report_checkpoint(position: Position, parts: dict[str, Any], *, rank: int) -> None:
    """Reports the end of an epoch, on every rank; rank 0 attaches position and the state of all parts.

    Args:
        position: after the epoch.
        parts: name -> module, optimiser or scaler, whatever has a `state_dict`.
        rank: of this worker.
    """
    metrics = {"epoch": position.epoch}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**asdict(position), **state}, Path(folder) / FILE)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def restore_checkpoint(parts: dict[str, Any], device: torch.device) -> Position:
    """Loads the last checkpoint, if there is one, into the parts and returns where training goes on."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / FILE, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return Position(int(state["epoch"]), int(state["step"]), state["val_balanced"])
