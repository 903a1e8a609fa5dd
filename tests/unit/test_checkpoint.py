"""A checkpoint is complete or absent, the last two are kept, and training goes on from the last."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from krd_ray.train.checkpoint import KEPT, Position, restore_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def parts_of(seed: int) -> dict[str, nn.Module | torch.optim.Optimizer]:
    """A net and its optimiser after one step."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {"student": net, "optimizer": optimizer}


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved, other = parts_of(1), parts_of(2)
    save_checkpoint(tmp_path / "checkpoints", Position(4, 60, 0.25), saved)
    assert restore_checkpoint(tmp_path / "checkpoints", other, CPU) == Position(4, 60, 0.25)
    assert torch.equal(saved["student"].weight, other["student"].weight)  # type: ignore[union-attr, arg-type]
    left, right = (p["optimizer"].state_dict()["state"][0]["momentum_buffer"] for p in (saved, other))
    assert torch.equal(left, right)


def test_without_a_checkpoint_training_begins_at_the_start(tmp_path: Path) -> None:
    parts = parts_of(1)
    before = parts["student"].weight.clone()  # type: ignore[union-attr, operator]
    assert restore_checkpoint(tmp_path / "none", parts, CPU) == Position(-1, 0, None)
    assert torch.equal(before, parts["student"].weight)  # type: ignore[union-attr, arg-type]


def test_the_last_two_are_kept_in_order_of_epochs(tmp_path: Path) -> None:
    for epoch in (7, 8, 9, 10, 100):
        save_checkpoint(tmp_path, Position(epoch, epoch), parts_of(epoch))
    assert len(list(tmp_path.iterdir())) == KEPT == 2
    assert restore_checkpoint(tmp_path, parts_of(0), CPU).epoch == 100


def test_half_a_file_of_a_killed_writer_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(3, 9), parts_of(1))
    whole = (tmp_path / "epoch-00003.pt").read_bytes()
    (tmp_path / "epoch-00004.partial").write_bytes(whole[: len(whole) // 2])
    assert restore_checkpoint(tmp_path, parts_of(0), CPU) == Position(3, 9, None)
    save_checkpoint(tmp_path, Position(4, 12), parts_of(1))
    assert restore_checkpoint(tmp_path, parts_of(0), CPU).epoch == 4
