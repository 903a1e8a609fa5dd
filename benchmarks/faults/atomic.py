"""Answers whether anything that is being saved can be read after kill -9: processes that save in a loop are killed.

Does not save by itself: `savers` does, with the functions that the project saves with.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.savers import SAVERS
from krd_ray.errors import KrdError

LONGEST_S = 0.2  # that a process saves before it is killed


def kill_savers(folder: Path, kills: int, *, seed: int = 0) -> dict[str, Any]:
    """Kills processes while they save, kind after kind in turn, and reads everything back each time.

    Args:
        folder: emptied before.
        kills: number of processes.
        seed: of the random moments.
    Returns:
        `kills`, `saves` (finished), `in_the_middle` (kills that left a `.partial` file behind), `unreadable` with
        `errors`: what could not be read, was mixed of two contents, or was older than a save that had returned.
    """
    shutil.rmtree(folder, ignore_errors=True)
    draws, counts, errors = random.Random(seed), {"saves": 0, "in_the_middle": 0}, []
    by_kind = {name: {"kills": 0, "unreadable": 0} for name in SAVERS}
    torch.set_num_threads(1)  # no pool of threads that a forked process would lack
    for kill in range(kills):
        name = list(SAVERS)[kill % len(SAVERS)]
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        before = _read(name, place)
        saved = _save_until_killed(name, place, before + 1, draws.uniform(0, LONGEST_S))
        by_kind[name]["kills"] += 1
        counts["saves"] += saved - before
        partials = list(place.rglob("*.partial"))
        counts["in_the_middle"] += len(partials) > 0
        for partial in partials:
            partial.unlink()
        try:
            found = _read(name, place)
            wrong = None if found >= saved else f"{found} was found after {saved} had been saved"
        except Exception as error:  # noqa: BLE001 - whatever it is, what was saved cannot be read
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            by_kind[name]["unreadable"] += 1
            errors.append(f"{name}: {wrong}")
            shutil.rmtree(place)
    return {"kills": kills, **counts, "unreadable": len(errors), "errors": errors, "by_kind": by_kind}


def _read(name: str, folder: Path) -> int:
    return SAVERS[name].load(folder)


def _save_until_killed(name: str, folder: Path, first: int, seconds: float) -> int:
    """Returns the number of the last save that had returned, `first` - 1 if none had."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_save_for_ever, args=(name, folder, first, theirs), daemon=True)
    process.start()
    theirs.close()
    saved = first - 1
    ours.recv()  # it begins
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise KrdError(f"the process that saved {name} ended by itself, with {process.exitcode}")
    while ours.poll():
        try:
            saved = ours.recv()
        except EOFError:
            break
    ours.close()
    return saved


def _save_for_ever(name: str, folder: Path, first: int, pipe: Connection) -> None:
    save, n = SAVERS[name].open(folder), first
    pipe.send(first - 1)
    while True:
        save(n)
        pipe.send(n)
        n += 1
