"""Answers what an epoch costs in a run of krd_ray beside the same epoch of a plain loop, undisturbed by drift.

`python -m benchmarks.speed.turns --cell n4-ratio4-shared-in-process`: both live at the same time and train the same
networks, teacher inside; all processes of one are stopped (SIGSTOP) while the other works, in turns of seconds: run,
loop, loop, run. A stopped process spends no CPU seconds, so epochs may be longer than turns. A machine's speed drifts
by tens of per cent within minutes, and two equal processes differ by a few: start it several times.
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
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import psutil  # type: ignore[import-untyped]
import torch
import typer

from benchmarks.entry import run_command
from benchmarks.speed.cells import CELLS, WARM_UP_EPOCHS, Cell
from benchmarks.speed.plain import Files, teacher_inside
from benchmarks.speed.setting import prepare_files, run_config
from krd_ray.config import RayConfig
from krd_ray.errors import ConfigError, Interrupted, RunError
from krd_ray.train.cluster import KEEP_FREED_MEMORY, connected
from krd_ray.train.run import start_run
from krd_ray.train.rundir import RunDir, environment, write_json

RESULTS = Path(__file__).parent.parent / "results" / "turns"
START_S = 120.0
ENDLESS = 100_000  # epochs

Costs = dict[str, list[float]]  # CPU seconds of each epoch so far, by contender


def main(
    cell: Annotated[str, typer.Option(help="row of benchmarks.speed that is one process")],
    rounds: Annotated[int, typer.Option(min=1, help="of four turns each")] = 8,
    turn_s: Annotated[float, typer.Option(help="seconds of a turn")] = 4.0,
    results: Annotated[Path, typer.Option(help="folder of the JSON file of all figures")] = RESULTS,
) -> None:
    """Measure CPU seconds per epoch of a run and of a plain loop that take turns."""
    one_process = {name: each for name, each in CELLS.items() if each.is_one_process and each.on == "cpu"}
    fit = [name for name, each in one_process.items() if each.placement == "in_process"]
    if cell not in fit:
        raise ConfigError(f"--cell must be one of {', '.join(fit)}, got {cell!r}")
    for variable, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(variable, value)  # read when a process starts, here as in a run
    with tempfile.TemporaryDirectory() as folder:
        costs = _measure(Path(folder), replace(CELLS[cell], epochs=ENDLESS), rounds, turn_s)
    if min(map(len, costs.values())) < 2:
        raise RunError(f"{rounds} rounds of {turn_s} s are not two whole epochs of each: give it more rounds")
    ratio, error = compare(costs)
    found = {"cell": cell, "turn_s": turn_s, "rounds": rounds, "cpu_s": costs, "ratio": ratio, "error": error}
    write_json(results / f"{cell}.json", {**found, "environment": environment()})
    typer.echo(
        f"{cell}: an epoch costs the run {ratio:.3f} (standard error {error:.3f}; {len(costs['krd'])} epochs) of the "
        f"CPU seconds that it costs the plain loop, {mean(costs['plain']):.2f} s"
    )


def compare(costs: Costs) -> tuple[float, float]:
    """Returns the ratio of mean costs, run over plain loop, and its standard error."""
    krd, plain = costs["krd"], costs["plain"]
    ratio = mean(krd) / mean(plain)
    parts = [(stdev(each) / mean(each)) ** 2 / len(each) for each in (krd, plain)]
    return ratio, float(ratio * sum(parts) ** 0.5)


def _measure(root: Path, cell: Cell, rounds: int, turn_s: float) -> Costs:
    """Costs of the epochs that ended after both had warmed up."""
    prepare_files(root, cell)
    context = multiprocessing.get_context("spawn")
    contenders = {
        "krd": context.Process(target=_train_here, args=(root, cell)),
        "plain": context.Process(target=_train_plainly, args=(root, cell)),
    }
    with _ended_at_last(list(contenders.values())):
        for contender in contenders.values():
            contender.start()
        _wait_for(lambda: min(map(len, _costs(root, cell).values())) > WARM_UP_EPOCHS)
        before = {who: len(costs) for who, costs in _costs(root, cell).items()}
        for who in ("krd", "plain", "plain", "krd") * rounds:
            for name, contender in contenders.items():
                _signal_all(contender, signal.SIGCONT if name == who else signal.SIGSTOP)
            time.sleep(turn_s)
        return {who: costs[before[who] :] for who, costs in _costs(root, cell).items()}


def _train_here(root: Path, cell: Cell) -> None:
    """A run of krd_ray, for ever."""
    with suppress(Interrupted), connected(RayConfig(num_cpus=cell.machine.num_cpus)):
        start_run(run_config(root, "turns", cell))


def _train_plainly(root: Path, cell: Cell) -> None:
    """B1, for ever."""
    torch.set_num_threads(1)
    run = teacher_inside(Files.load(root, cell), cell.num_students, 0)
    with (root / "plain.txt").open("w") as lines:
        for epoch in range(ENDLESS):
            started = time.process_time()
            for _ in run(epoch):
                pass
            lines.write(f"{time.process_time() - started}\n")
            lines.flush()


@contextmanager
def _ended_at_last(contenders: list[SpawnProcess]) -> Iterator[None]:
    """A driver that gets SIGTERM takes its cluster with it."""
    try:
        yield
    finally:
        for contender in contenders:
            if contender.pid is not None:
                _signal_all(contender, signal.SIGCONT)
                contender.terminate()
                contender.join()


def _signal_all(contender: SpawnProcess, number: int) -> None:
    """To a contender and all that it has started, its cluster too."""
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(contender.pid)
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _costs(root: Path, cell: Cell) -> Costs:
    """Of all whole epochs so far; a run's are those that all its students have ended."""
    run, plain = RunDir(root / "runs" / "turns"), root / "plain.txt"
    by_student = [
        [row["cpu_s"] for row in run.student(f"student{k}").rows() if row["split"] == "train"]
        for k in range(cell.num_students)
    ]
    lines = plain.read_text().splitlines(keepends=True) if plain.exists() else []
    return {
        "krd": [sum(epoch) for epoch in zip(*by_student, strict=False)],
        "plain": [float(line) for line in lines if line.endswith("\n")],
    }


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise RunError(f"a contender has not begun within {START_S:.0f} s; its error stands above")
        time.sleep(0.2)


if __name__ == "__main__":
    run_command(main)
