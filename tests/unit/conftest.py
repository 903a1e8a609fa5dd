"""Answers what all unit tests share: torch runs in one thread, so that tiny tensors do not wait for other cores."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    torch.set_num_threads(1)
