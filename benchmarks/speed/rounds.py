"""Answers what one cell costs: rounds in which a run of krd_ray stands between two measurements of the plain loops.

Does not tabulate. A machine's speed drifts within minutes, so ratios are taken within a round, and each contender's
turn is short.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.cells import WARM_UP_EPOCHS, Cell
from benchmarks.speed.krd_runs import krd_run
from benchmarks.speed.naive_ray import naive_epochs
from benchmarks.speed.setting import prepare_files
from krd_ray.config import RayConfig
from krd_ray.errors import KrdError
from krd_ray.train.cluster import connected

Epochs = list[dict[str, float]]
NAIVE_CELL = "n4-ratio4"
PLAIN_EPOCHS = {"cpu": 1, "cuda": 3}


def measure(root: Path, name: str, cell: Cell) -> dict[str, Any]:
    """Plain loops, then run and plain loops again, as often as the cell has rounds."""
    prepare_files(root, cell)
    plain, runs, naive = [_plain(root, cell)], [], []
    for number in range(cell.rounds):
        with connected(RayConfig(num_cpus=cell.machine.num_cpus)):
            runs.append(krd_run(root, f"{name}-{int(time.time())}-{number}", cell))
            if name == NAIVE_CELL:
                naive.append(naive_epochs(root, cell)[WARM_UP_EPOCHS:])
        plain.append(_plain(root, cell))
    return {"cell": asdict(cell), "krd": runs, "naive_ray": naive, "plain": plain}


def measure_on_card(root: Path, cells: dict[str, Cell]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells of one teacher and one kind of student: the plain loops of all of them in one process, then the runs.

    Nobody else works on a card and its speed does not drift, so turns need not be short; starts last longer than
    epochs.
    """
    first = next(iter(cells.values()))
    prepare_files(root, first)
    plain = _copies(root, "inside", first, sorted({1, *(cell.num_students for cell in cells.values())}), 1)
    with connected(RayConfig(num_cpus=first.machine.num_cpus)):
        for name, cell in cells.items():
            runs = [krd_run(root, f"{name}-{int(time.time())}-{k}", cell) for k in range(cell.rounds)]
            both = {"alone": plain[1], "one_process": plain[cell.num_students]}
            yield name, {"cell": asdict(cell), "krd": runs, "naive_ray": [], "plain": [both]}


def _plain(root: Path, cell: Cell) -> dict[str, Epochs]:
    """Epochs of the plain contenders.

    On a CPU two copies of each run at the same time, so that both cores are as busy as they are in a run: a core
    computes less per CPU second when its neighbour works too. Beside a run that is one process itself they run alone,
    and so does the free teacher, which is compared by images/s.
    """
    num = cell.num_students
    copies = 1 if cell.is_one_process else cell.machine.copies
    if cell.placement == "stored":
        return {"free": _copies(root, "free", cell, [num], copies=1)[num]}
    found = {"alone": _copies(root, "inside", cell, [1], copies)[1]}
    found["one_process"] = _copies(root, "inside", cell, [num], copies)[num] if num > 1 else found["alone"]
    if num == 1 and importlib.util.find_spec("timm"):  # no dependency of krd_ray
        found["timm"] = _copies(root, "timm", cell, [1], copies)[1]
    return found


def _copies(root: Path, contender: str, cell: Cell, nums: Sequence[int], copies: int) -> dict[int, Epochs]:
    """Epochs by number of students; each process trains those numbers one after the other."""
    epochs = PLAIN_EPOCHS[cell.machine.device]
    command = [sys.executable, "-m", "benchmarks.speed.plain", contender, str(root), json.dumps(asdict(cell))]
    processes = [
        subprocess.Popen(
            [*command, json.dumps(nums), str(epochs), str(seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(copies)
    ]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise KrdError(f"the contender {contender} failed; its error stands above")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {num: [epoch for each in found for epoch in each[str(num)]] for num in nums}
