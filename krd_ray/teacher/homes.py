"""Answers which replica of the teacher is the home of a sample, so that each has one home and one forward.

Does not know which replicas are alive: a dead one comes back under the same number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def home_of(sample_ids: npt.NDArray[np.int64], num_replicas: int) -> npt.NDArray[np.int64]:
    """Returns the replica number of each sample, in [0, num_replicas).

        home = (id * 0x9E3779B97F4A7C15 mod 2^64) >> 32 mod num_replicas

    Args:
        sample_ids: int64 [B].
        num_replicas: n >= 1.
    Returns:
        int64 [B]; the same in every process.

    Example:
        >>> home_of(np.arange(4), 1).tolist()
        [0, 0, 0, 0]
    """
    mixed = sample_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(num_replicas)).astype(np.int64)
