"""Answers what sharing a teacher costs and saves: `python -m benchmarks.speed` measures, tabulates and draws.

Does not hold formulas of the ledger. Contenders take turns within one call; the machine should do nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.entry import run_command
from benchmarks.speed.cells import CELLS, COOL_DOWN_EPOCHS, MACHINES, WARM_UP_EPOCHS, Cell
from benchmarks.speed.rounds import measure, measure_on_card
from benchmarks.speed.slow import measure_slow
from benchmarks.speed.table import write_table
from krd_ray.train.cluster import KEEP_FREED_MEMORY
from krd_ray.train.rundir import environment, write_json

RESULTS = Path(__file__).parent.parent / "results" / "speed"
TINY_EPOCHS = WARM_UP_EPOCHS + 1 + COOL_DOWN_EPOCHS


def main(
    cells: Annotated[list[str] | None, typer.Option("--cell", help="row to measure; may be repeated")] = None,
    on: Annotated[str, typer.Option(help="without --cell: all rows of `cpu` or of `gpu`")] = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="runs per row; default: as the row says, mostly 5")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of shards, weights and runs")] = Path("runs/speed"),
    results: Annotated[Path, typer.Option(help="folder of figures, table and picture")] = RESULTS,
    tiny: Annotated[bool, typer.Option(help="two epochs each: does everything run?")] = False,
    report: Annotated[bool, typer.Option(help="only make table and picture from what is there")] = False,
) -> None:
    """Measure what an epoch of krd_ray and of its contenders costs, taking turns: CPU seconds, or a card's."""
    known = [*CELLS, "slow"]
    for name in cells or []:
        if name not in known:
            raise typer.BadParameter(f"--cell must be one of {', '.join(known)}, got {name!r}")
    if on not in MACHINES:
        raise typer.BadParameter(f"--on must be one of {', '.join(MACHINES)}, got {on!r}")
    wanted = cells or [name for name in known if (CELLS[name].on if name in CELLS else "cpu") == on]
    # Equal terms: krd_ray's processes keep freed memory, and so do the contenders.
    for variable, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(variable, value)
    root, results = out.resolve(), results / "tiny" if tiny else results
    chosen = {name: _chosen(CELLS[name], rounds, tiny=tiny) for name in wanted if name in CELLS}
    started = time.time()
    for name, found in [] if report else _measured(root, chosen, slow="slow" in wanted, tiny=tiny):
        found |= {"minutes": (time.time() - started) / 60, "environment": environment()}
        write_json(results / f"{name}.json", found)
        typer.echo(f"{name}: {found['minutes']:.1f} min")
        started = time.time()
    write_table(results)


def _chosen(cell: Cell, rounds: int | None, *, tiny: bool) -> Cell:
    if tiny:
        return replace(cell, epochs=TINY_EPOCHS, rounds=1)
    return replace(cell, rounds=rounds or cell.rounds)


def _measured(
    root: Path, cells: dict[str, Cell], *, slow: bool, tiny: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each row; rows on a card share what they can."""
    for name, cell in cells.items():
        if cell.on == "cpu":
            yield name, measure(root, name, cell)
    on_card = {name: cell for name, cell in cells.items() if cell.on == "gpu"}
    if on_card:
        yield from measure_on_card(root, on_card)
    if slow:
        few = {"epochs": TINY_EPOCHS, "rounds": 1} if tiny else {}
        yield "slow", measure_slow(root / f"slow-{int(time.time())}", **few)


if __name__ == "__main__":
    run_command(main)
