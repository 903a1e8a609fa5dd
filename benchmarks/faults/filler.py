"""Answers what a crowded object store does to others: fills it several times over, prints the bytes spilled to disk.

Runs as a job of its own, `python -m benchmarks.faults.filler ADDRESS BYTES`; it fills when a line comes in.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import ray

CHUNK_BYTES = 8 << 20
HOLD_S, PATIENCE_S = 1.0, 20.0
READY = "ready"


def main(address: str, num_bytes: int) -> None:
    """Says that it is ready, waits for a line, puts objects, holds them for a moment and lets them go."""
    ray.init(address=address, log_to_driver=False)
    print(READY, flush=True)
    sys.stdin.readline()
    held = [ray.put(np.full(CHUNK_BYTES, k, np.uint8)) for k in range(num_bytes // CHUNK_BYTES)]
    deadline = time.monotonic() + PATIENCE_S
    while _spilled_bytes() == 0 and time.monotonic() < deadline:  # a busy machine spills later
        time.sleep(HOLD_S / 10)
    time.sleep(HOLD_S)
    print(_spilled_bytes())
    del held


def _spilled_bytes() -> int:
    files = [
        path for path in Path(os.environ["RAY_TMPDIR"]).rglob("ray_spilled_objects*/*") if path.is_file()
    ]
    return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
