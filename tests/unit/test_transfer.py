"""Arrays come onto a device as they are, whatever their memory looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krd_ray.maths.transfer import on_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
def test_values_and_dtype_stay(dtype: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = on_device(array, CPU)
    assert np.array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == array.dtype


def test_own_memory_is_shared_and_read_only_memory_is_not() -> None:
    own = np.zeros(3)
    on_device(own, CPU)[0] = 1
    assert own[0] == 1
    stored = np.zeros(3)
    stored.flags.writeable = False
    on_device(stored, CPU)[0] = 1
    assert stored[0] == 0


def test_memory_with_gaps_is_copied_in_order() -> None:
    wide = np.arange(12).reshape(3, 4)
    assert on_device(wide[:, ::2], CPU).tolist() == [[0, 2], [4, 6], [8, 10]]
    assert on_device(wide[::-1], CPU).tolist() == wide[::-1].tolist()
