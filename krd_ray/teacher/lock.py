"""Answers who may use a folder now: one process at a time, until it lets go or dies.

Does not make the folder whole again after somebody died in it.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from krd_ray.errors import KrdError

LOOK_S = 0.1


def hold_lock(path: Path, busy: KrdError, *, wait_s: float) -> IO[bytes]:
    """Locks a file until the returned one is closed or this process dies; the file itself stays.

    Args:
        path: of the file; made where it is missing, and its folder too.
        busy: raised when somebody else keeps the lock.
        wait_s: a killed process lets go of its lock at once, but may take a moment to die.
    Raises:
        KrdError: `busy`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                file.close()
                raise busy from error
            time.sleep(LOOK_S)
