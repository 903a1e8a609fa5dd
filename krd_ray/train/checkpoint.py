"""Answers what a student's checkpoint holds, where it lies and how training goes on from it.

Does not decide when (`loop` does). A checkpoint is one file, complete or absent; the last two are kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from krd_ray.atomic import write_file

KEPT = 2
PATTERN = "epoch-*.pt"


@dataclass(frozen=True)
class Position:
    """Where training stands: last finished epoch (-1: none), steps done, balanced accuracy of the last validation."""

    epoch: int = -1
    step: int = 0
    val_balanced: float | None = None


def save_checkpoint(folder: Path, position: Position, parts: dict[str, Any]) -> None:
    """Writes position and the state of all parts in one step, and removes all but the last two.

    Args:
        folder: of this student's checkpoints.
        position: after the epoch.
        parts: name -> module, optimiser or scaler, whatever has a `state_dict`.
    """
    content = {**asdict(position), **{name: part.state_dict() for name, part in parts.items()}}

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # else torch hides that the disk is full
            torch.save(content, file)

    write_file(folder / f"epoch-{position.epoch:05d}.pt", write)
    for old in [
        *sorted(folder.glob(PATTERN))[:-KEPT],
        *folder.glob(".*.partial"),
    ]:  # of writers that were killed
        old.unlink()


def restore_checkpoint(folder: Path, parts: dict[str, Any], device: torch.device) -> Position:
    """Loads the last checkpoint, if there is one, into the parts and returns where training goes on."""
    found = sorted(folder.glob(PATTERN))
    if not found:
        return Position()
    state = torch.load(found[-1], map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return Position(int(state["epoch"]), int(state["step"]), state["val_balanced"])
