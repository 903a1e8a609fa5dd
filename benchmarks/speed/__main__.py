"""Answers what sharing a teacher costs and saves: `python -m benchmarks.speed` measures, tabulates and draws.

Does not hold formulas of the ledger. Contenders take turns within one call; the machine should do nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.entry import run_command
from benchmarks.speed.cells import CELLS, WARM_UP_EPOCHS, Cell
from benchmarks.speed.krd_runs import krd_run
from benchmarks.speed.naive_ray import naive_epochs
from benchmarks.speed.setting import prepare_files
from benchmarks.speed.slow import measure_slow
from benchmarks.speed.table import write_table
from krd_ray.config import RayConfig
from krd_ray.errors import KrdError
from krd_ray.train.cluster import KEEP_FREED_MEMORY, connected
from krd_ray.train.rundir import environment, write_json

RESULTS = Path(__file__).parent.parent / "results" / "speed"
TINY_EPOCHS = WARM_UP_EPOCHS + 1
MEASURED_EPOCHS = 2  # of a plain contender, before the run and again after it


def main(
    cells: Annotated[list[str] | None, typer.Option("--cell", help="row to measure; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="folder of shards, weights and runs")] = Path("runs/speed"),
    results: Annotated[Path, typer.Option(help="folder of figures, table and picture")] = RESULTS,
    tiny: Annotated[bool, typer.Option(help="two epochs each: does everything run?")] = False,
    report: Annotated[bool, typer.Option(help="only make table and picture from what is there")] = False,
) -> None:
    """Measure CPU seconds per epoch of krd_ray and its contenders, in one call, taking turns."""
    known = [*CELLS, "slow"]
    for name in cells or []:
        if name not in known:
            raise typer.BadParameter(f"--cell must be one of {', '.join(known)}, got {name!r}")
    # Equal terms: Ray's workers are nice by default, and krd_ray's keep freed memory; the contenders do as they do.
    for variable, value in {"RAY_worker_niceness": "0", **KEEP_FREED_MEMORY}.items():
        os.environ.setdefault(variable, value)
    root, results = out.resolve(), results / "tiny" if tiny else results
    for name in [] if report else cells or known:
        started = time.time()
        if name == "slow":
            few = {"epochs": TINY_EPOCHS, "rounds": 1} if tiny else {"epochs": WARM_UP_EPOCHS + 3}
            found = measure_slow(root / f"slow-{int(started)}", **few)
        else:
            cell = replace(CELLS[name], epochs=TINY_EPOCHS) if tiny else CELLS[name]
            found = measure(root, name, cell)
        found |= {"minutes": (time.time() - started) / 60, "environment": environment()}
        write_json(results / f"{name}.json", found)
        typer.echo(f"{name}: {found['minutes']:.1f} min")
    write_table(results)


def measure(root: Path, name: str, cell: Cell) -> dict[str, Any]:
    """One cell: plain contenders, the run, naive Ray, the plain contenders again."""
    prepare_files(root, cell.teacher)
    before = _plain(root, cell)
    with connected(RayConfig(num_cpus=2)):
        run = krd_run(root, f"{name}-{int(time.time())}", cell)
        naive = naive_epochs(root, replace(cell, epochs=WARM_UP_EPOCHS + 2)) if name == "n4-ratio4" else None
    after = _plain(root, cell)
    plain = {key: before[key] + after[key] for key in before}
    naive = naive and naive[WARM_UP_EPOCHS:]
    return {"cell": cell.__dict__, "krd": run, "naive_ray": naive, "plain": plain}


def _plain(root: Path, cell: Cell) -> dict[str, list[dict[str, float]]]:
    """Epochs of the plain contenders, warm-up left out.

    Two copies of each run at the same time, so that both cores are as busy as they are in a run: a core computes
    less per CPU second when its neighbour works too. The free teacher is compared by images/s: it runs alone.
    """
    epochs = min(cell.epochs, WARM_UP_EPOCHS + MEASURED_EPOCHS)
    if cell.placement == "stored":
        return {"free": _copies(root, "free", cell, cell.num_students, cell.epochs, num_copies=1)}
    measured = {
        "alone": _copies(root, "inside", cell, 1, epochs),
        "one_process": _copies(root, "inside", cell, cell.num_students, epochs),
    }
    if cell.num_students == 1 and importlib.util.find_spec("timm"):  # no dependency of krd_ray
        measured["timm"] = _copies(root, "timm", cell, 1, epochs)
    return measured


def _copies(
    root: Path, contender: str, cell: Cell, num_students: int, epochs: int, num_copies: int = 2
) -> list[dict[str, float]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.plain",
        contender,
        str(root),
        cell.teacher,
        cell.student,
    ]
    processes = [
        subprocess.Popen(
            [*command, str(num_students), str(epochs), str(copy)], stdout=subprocess.PIPE, text=True
        )
        for copy in range(num_copies)
    ]
    answers = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise KrdError(f"the contender {contender} failed; its error stands above")
    return [epoch for answer in answers for epoch in json.loads(answer.splitlines()[-1])[WARM_UP_EPOCHS:]]


if __name__ == "__main__":
    run_command(main)
