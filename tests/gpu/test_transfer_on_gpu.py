"""Copies through pinned memory arrive as they were sent, also when several are on their way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krd_ray.maths.transfer import on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_gets_the_same_values() -> None:
    array = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)
    copies = [on_device(array + np.uint8(k), torch.device("cuda")) for k in range(8)]
    for k, copy in enumerate(copies):
        assert np.array_equal(copy.cpu().numpy(), array + np.uint8(k))
