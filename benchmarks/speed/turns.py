"""Answers what a batch costs in a worker of krd_ray beside the same batch in a plain loop, undisturbed by drift.

`python -m benchmarks.speed.turns`: both processes live at the same time and train the same networks, teacher inside;
one is stopped (SIGSTOP) while the other works, in turns of seconds: worker, loop, loop, worker. A machine's speed
drifts by tens of per cent within minutes, and two equal processes differ by a few: start it several times.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated

import torch
import typer

from benchmarks.entry import run_command
from benchmarks.speed.cells import CELLS, Cell
from benchmarks.speed.plain import Files, teacher_inside
from benchmarks.speed.setting import prepare_files, run_config
from krd_ray.config import RayConfig
from krd_ray.errors import ConfigError, Interrupted, RunError
from krd_ray.train.cluster import KEEP_FREED_MEMORY, connected
from krd_ray.train.run import start_run
from krd_ray.train.rundir import RunDir, environment, write_json

RESULT = Path(__file__).parent.parent / "results" / "turns.json"
CELL = "n4-ratio4-shared-in-process"
SETTLE_S, START_S = 0.3, 120.0
ENDLESS = 100_000  # epochs
EACH_BATCH_S = 1e-6
WHOLE = 0.85  # of the median: an epoch's last batch is smaller, and is left out


def main(
    cell: Annotated[str, typer.Option(help="row of benchmarks.speed that is one process")] = CELL,
    rounds: Annotated[int, typer.Option(min=2, help="of four turns each")] = 6,
    turn_s: Annotated[float, typer.Option(help="seconds of a turn")] = 6.0,
    result: Annotated[Path, typer.Option(help="JSON file of all figures")] = RESULT,
) -> None:
    """Measure seconds per batch of a worker and of a plain loop that take turns."""
    fit = [
        name
        for name, each in CELLS.items()
        if each.is_one_process and each.placement == "in_process" and each.on == "cpu"
    ]
    if cell not in fit:
        raise ConfigError(f"--cell must be one of {', '.join(fit)}, got {cell!r}")
    for variable, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(variable, value)  # read when a process starts, here as in a run
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(Path(folder), replace(CELLS[cell], epochs=ENDLESS), rounds, turn_s)
    ratios = found["ratios"]
    write_json(result, {"cell": cell, "turn_s": turn_s, **found, "environment": environment()})
    typer.echo(
        f"{cell}: a batch takes the worker {mean(ratios):.3f} (standard deviation {stdev(ratios):.3f}, {rounds} "
        f"rounds) of what it takes the plain loop, {median(found['plain']):.3f} s"
    )


def _measure(root: Path, cell: Cell, rounds: int, turn_s: float) -> dict[str, list[float]]:
    prepare_files(root, cell)
    run, lines = RunDir(root / "runs" / "turns"), root / "plain.txt"
    context = multiprocessing.get_context("spawn")
    contenders = [
        context.Process(target=target, args=(root, cell), daemon=False)
        for target in (_train_here, _train_plainly)
    ]
    with _ended_at_last(contenders):
        for contender in contenders:
            contender.start()
        pids = {"krd": _pid_of_worker(run, cell), "plain": contenders[1].pid or 0}
        _wait_for(lambda: len(_moments(lines)) > 1)
        turns = [
            (who, *_turn(pids, who, turn_s))
            for _ in range(rounds)
            for who in ("krd", "plain", "plain", "krd")
        ]
        os.kill(pids["krd"], signal.SIGCONT)
        moments = {"krd": _moments_of_run(run, cell), "plain": _moments(lines)}
    took = {"krd": list[float](), "plain": list[float]()}
    for who, start, end in turns:
        took[who].append(_whole_batch(moments[who], start, end))
    rounds_s = {
        who: [a + b for a, b in zip(each[::2], each[1::2], strict=True)] for who, each in took.items()
    }
    ratios = [krd / plain for krd, plain in zip(rounds_s["krd"], rounds_s["plain"], strict=True)]
    return {**took, "ratios": ratios}


def _train_here(root: Path, cell: Cell) -> None:
    """A run of krd_ray that notes the end of every batch."""
    config = run_config(root, "turns", cell)
    train = config.train.model_copy(update={"progress_every_s": EACH_BATCH_S})
    with suppress(Interrupted), connected(RayConfig(num_cpus=cell.machine.num_cpus)):
        start_run(config.model_copy(update={"train": train}))


def _train_plainly(root: Path, cell: Cell) -> None:
    """B1, for ever."""
    torch.set_num_threads(1)
    run = teacher_inside(Files.load(root, cell), cell.num_students, 0)
    with (root / "plain.txt").open("w") as lines:
        for epoch in range(ENDLESS):
            for _ in run(epoch):
                lines.write(f"{time.time()}\n")
                lines.flush()


@contextmanager
def _ended_at_last(contenders: list[multiprocessing.context.SpawnProcess]) -> Iterator[None]:
    """A driver that gets SIGTERM takes its cluster with it, a stopped worker too."""
    try:
        yield
    finally:
        for contender in contenders:
            if contender.pid is not None:
                os.kill(contender.pid, signal.SIGCONT)
                contender.terminate()
                contender.join()


def _turn(pids: dict[str, int], who: str, turn_s: float) -> tuple[float, float]:
    """Lets one work and stops the other; returns when it began and ended."""
    for name, pid in pids.items():
        os.kill(pid, signal.SIGCONT if name == who else signal.SIGSTOP)
    started = time.time()
    time.sleep(turn_s)
    return started + SETTLE_S, time.time()


def _whole_batch(moments: list[float], start: float, end: float) -> float:
    """Mean seconds of the whole batches between two moments."""
    inside = [moment for moment in moments if start < moment < end]
    took = [b - a for a, b in pairwise(inside)]
    if not took:
        raise RunError(f"no batch ended within a turn of {end - start:.1f} s: make --turn-s larger")
    return mean(each for each in took if each > WHOLE * median(took))


def _moments(path: Path) -> list[float]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [float(line) for line in lines if line.endswith("\n")]


def _moments_of_run(run: RunDir, cell: Cell) -> list[float]:
    """When the last student of the process had made its steps."""
    rows = run.student(f"student{cell.num_students - 1}").rows()
    return [row["time"] for row in rows if row["split"] == "progress"]


def _pid_of_worker(run: RunDir, cell: Cell) -> int:
    _wait_for(lambda: bool(_moments_of_run(run, cell)))
    return int(run.student("student0").rows()[0]["pid"])


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RunError(f"a contender has not begun within {START_S:.0f} s; its error stands above")
        time.sleep(0.2)


if __name__ == "__main__":
    run_command(main)
