"""Answers how an array of this process comes onto a device.

Does not decide which arrays do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("uint8", "int64", "float16", "float32", "float64")}


def on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Returns the array as a tensor on the device.

    On a GPU the copy goes through pinned memory and runs beside what the device computes. On a CPU the tensor shares
    the array's memory, unless that is read-only (an object of Ray's store) or has gaps: then it is a copy.

    Args:
        array: any shape and dtype.
        device: to compute on.
    Example:
        >>> on_device(np.arange(3), torch.device("cpu"))
        tensor([0, 1, 2])
    """
    if device.type == "cpu":
        usable = array.flags.writeable and array.flags.c_contiguous
        return torch.from_numpy(array if usable else np.array(array, order="C"))
    pinned = torch.empty(array.shape, dtype=DTYPES[array.dtype.name], pin_memory=True)
    pinned.numpy()[...] = array  # one copy, also from the read-only memory of an object store
    return pinned.to(device, non_blocking=True)
