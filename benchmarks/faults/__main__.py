"""Answers what survives when parts die: `python -m benchmarks.faults` runs a distillation under each kind of fault.

Does not hold promises (`registry` does) and judges nothing (`verdict` does). Ends with 1 if a promise was broken.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.entry import run_command
from benchmarks.faults.setting import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before Ray is imported

from benchmarks.faults.atomic import kill_savers
from benchmarks.faults.registry import FAULTS
from benchmarks.faults.setting import Files
from benchmarks.faults.table import write_table
from benchmarks.faults.trial import try_fault, unfaulted_run
from krd_ray.errors import KrdError
from krd_ray.train.rundir import RunDir, environment, read_json, write_json

RESULTS = Path(__file__).parent.parent / "results" / "faults"
PARTS = ("runs", "atomic")


def main(
    faults: Annotated[list[str] | None, typer.Option("--fault", help="one kind; may be repeated")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="runs of each fault")] = 3,
    first: Annotated[
        int, typer.Option(min=0, help="number of the first run; earlier ones stay in the results")
    ] = 0,
    part: Annotated[
        list[str] | None, typer.Option(help="runs: whole runs under faults; atomic: kills while saving")
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="atomic: processes killed while they save")] = 200,
    out: Annotated[Path, typer.Option(help="folder of shards, teacher and runs")] = Path("runs/faults"),
    results: Annotated[Path, typer.Option(help="folder of figures and table")] = RESULTS,
    report: Annotated[bool, typer.Option(help="only make the table from what is there")] = False,
) -> None:
    """Do faults to small distillations, and say for each what was promised and whether it was kept."""
    _refuse_unknown("--fault", faults, FAULTS)
    _refuse_unknown("--part", part, PARTS)
    chosen = part or (["runs"] if faults else list(PARTS))
    root, broken = out.resolve(), 0
    if "atomic" in chosen and not report:
        found = kill_savers(root / "atomic", kills)
        broken += found["unreadable"]
        write_json(results / "atomic.json", found | {"environment": environment()})
    if "runs" in chosen and not report:
        numbers = range(first, first + repetitions)
        broken += _run_faults(faults or list(FAULTS), numbers, root, results)
    typer.echo(write_table(results))
    if broken:
        raise KrdError(f"{broken} promise(s) broken; the files in {results} say which")


def _run_faults(names: list[str], numbers: range, root: Path, results: Path) -> int:
    """Returns the number of repetitions that did not keep their promise."""
    files, unfaulted, broken = Files.prepare(root), dict[str, list[RunDir]](), 0
    for name in names:
        setting = FAULTS[name].setting
        if setting not in unfaulted:
            folders = [root / f"unfaulted-{setting.replace(' ', '-')}-{k}" for k in range(2)]
            unfaulted[setting] = [unfaulted_run(files, setting, folder) for folder in folders]
        path = results / f"{name}.json"
        found: list[dict[str, Any]] = read_json(path)["repetitions"][: numbers.start] if numbers.start else []
        for repetition in numbers:
            folder = root / f"{name}-{repetition}"
            found.append(try_fault(name, repetition, files, folder, unfaulted[setting]))
            broken += not found[-1]["kept"]
            typer.echo(_line(name, found[-1]))
            write_json(path, {"what": FAULTS[name].what, "repetitions": found, "environment": environment()})
    return broken


def _line(name: str, found: dict[str, Any]) -> str:
    wrong = [part for part, kept in found.get("checks", {}).items() if not kept]
    verdict = "kept" if found["kept"] else f"BROKEN ({found.get('error') or ', '.join(wrong)})"
    recovery = found.get("recover_s")
    seconds = "-" if recovery is None else f"{recovery:.1f} s"
    return f"{name} {found['repetition']}: {verdict}, recovery {seconds}, {found['seconds']:.0f} s in all"


def _refuse_unknown(option: str, names: list[str] | None, known: Any) -> None:
    for name in names or []:
        if name not in known:
            raise typer.BadParameter(f"{option} must be one of {', '.join(known)}, got {name!r}")


if __name__ == "__main__":
    run_command(main)
