"""Answers what a search costs and what it finds: `python -m benchmarks.search` measures both and writes them down.

Does not hold formulas and chooses nothing. Shards and teacher are those of `benchmarks.quality`, made if missing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.entry import run_command
from benchmarks.quality.__main__ import Bench
from benchmarks.search.bound import Bound, measure_bound
from benchmarks.search.gain import search_gain
from krd_ray.train.rundir import environment, write_json

RESULTS = Path(__file__).parent.parent / "results" / "search"
ROOT = Path(__file__).parents[2]
PARTS = ("bound", "gain")
RATIO = 100


def main(
    data: Annotated[Path, typer.Option(help="folder of train.parquet and test.parquet, or of CIFAR-100")],
    part: Annotated[
        list[str] | None, typer.Option(help="bound: cost of 16 trials; gain: a search and its confirmation")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the searches")] = Path("runs/search"),
    shared: Annotated[
        Path, typer.Option(help="folder of the quality benchmark, whose shards and teacher are used")
    ] = Path("runs/quality"),
    results: Annotated[Path, typer.Option(help="folder of figures, tables and pictures")] = RESULTS,
    space: Annotated[Path, typer.Option(help="gain: what is searched")] = ROOT
    / "tune_spaces/loss_weights.py",
    trials: Annotated[int | None, typer.Option(help="of either part [default: bound 16, gain 32]")] = None,
    epochs: Annotated[int, typer.Option(help="gain: of a trial")] = 8,
    rounds: Annotated[int, typer.Option(help="bound: pairs of searches, shared and free in turn")] = 2,
    tiny: Annotated[bool, typer.Option(help="a few images and trials: does everything run?")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="override a setting of the searches' config")
    ] = None,
) -> None:
    """Measure the bound on a search's cost, and search CIFAR-100-LT for a better config."""
    chosen = part or list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise typer.BadParameter(f"--part must be one of {', '.join(PARTS)}, got {unknown[0]!r}")
    form = "cpu-tiny" if tiny else "cpu"
    quality = Bench("cpu", shared.resolve() / form, data.resolve(), download=False, tiny=tiny, settings=[])
    weights = quality.teacher("teacher", RATIO)
    own = [f"data.dir={quality.shards(RATIO)}", f"teacher.weights={weights}", *(settings or [])]
    own += ["teacher.min_accuracy=0"] if tiny else []
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in chosen:
        started = time.time()
        root, folder = out.resolve() / f"{name}-{stamp}", results.resolve() / ("tiny" if tiny else "") / name
        if name == "bound":
            bound = Bound(trials or (2 if tiny else 16), 1 if tiny else rounds)
            found: dict[str, Any] = measure_bound(root, folder, own, bound)
        else:
            few = {"trials": trials or 2, "epochs": 1} if tiny else {"trials": trials or 32, "epochs": epochs}
            found = search_gain(root, folder / space.stem, own, space, tiny=tiny, **few)
        folder = folder if name == "bound" else folder / space.stem
        found |= {"minutes": (time.time() - started) / 60, "environment": environment()}
        write_json(folder / f"{name}.json", found)
        typer.echo(f"{name}: {found['minutes']:.1f} min, written to {folder}")


if __name__ == "__main__":
    run_command(main)
