"""Answers whether a compiled teacher says what the plain one says, and what happens when it cannot be compiled.

What is recorded on a GPU is tested in the gpu tier.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from krd_ray.errors import TeacherError
from krd_ray.models.registry import build_model
from krd_ray.teacher.recorded import record_forward

SHAPE, CPU = (4, 3, 8, 8), torch.device("cpu")
VIEW = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def plain(view: Tensor) -> tuple[Tensor, Tensor]:
    return view.mean(dim=(2, 3)), view.flatten(1)


def test_off_is_the_forward_itself() -> None:
    assert record_forward(plain, SHAPE, CPU, "off") is plain


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_says_the_same() -> None:
    net = build_model("digits_net_4", num_classes=5, image_size=8, seed=0).eval().requires_grad_(False)
    compiled = record_forward(net, SHAPE, CPU, "inductor")
    with torch.inference_mode():
        for found, expected in zip(compiled(VIEW + 1), net(VIEW + 1), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_network_that_cannot_be_compiled_says_which_setting_to_change() -> None:
    def broken(view: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(f"no views of {len(view)} rows")

    with pytest.raises(TeacherError, match=r"teacher.compile is inductor.*set teacher.compile to off"):
        record_forward(broken, SHAPE, CPU, "inductor")
