"""Answers what the data path alone costs: stream, views, store, rectification. `python -m benchmarks.data_path`

Does not train, and starts no teacher. Everything is compared within one run, in turns, on one torch thread; writes
benchmarks/results/data_path.json.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.data_path.images import SIDE
from benchmarks.data_path.loaders import EPOCHS, WINDOW_ROWS, stream_part
from benchmarks.data_path.parts import rectify_calls, store_calls, view_calls
from benchmarks.data_path.turns import BATCH, interleaved_ms
from krd_ray.train.rundir import environment, write_json

STREAM_BOUND_FRAC, STORE_BOUND_MS = 0.9, 1.0
PARTS = ("stream", "views", "store", "rectify")
RESULTS = Path(__file__).parent.parent / "results" / "data_path.json"


def bounds_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured. A stream is compared with the peer of as many worker processes."""
    rates = {(e["store"], e["loader"], e["view"]): e["rows_per_s"] for e in result.get("stream", [])}
    found = []
    for store, ours, view in rates:
        if ours.startswith("krd"):
            peer = "torch, 0 workers" if ours == "krd cached" else "torch, 1 worker"
            ratio = rates[store, ours, view] / rates[store, peer, view]
            what = f"{ours}, {store}{', view' if view else ''}: rows/s over {peer}"
            found.append(
                {
                    "what": what,
                    "bound": f">= {STREAM_BOUND_FRAC}",
                    "got": round(ratio, 3),
                    "holds": ratio >= STREAM_BOUND_FRAC,
                }
            )
    for name, value in result.get("store", {}).items():
        found.append(
            {
                "what": f"store, {name}: ms",
                "bound": f"< {STORE_BOUND_MS:g}",
                "got": value,
                "holds": value < STORE_BOUND_MS,
            }
        )
    return found


def show(result: dict[str, Any]) -> None:
    console = Console()
    if "stream" in result:
        table = Table("images", "loader", "view", "rows/s", "first batch, ms")
        for e in result["stream"]:
            rate, first = f"{e['rows_per_s']:,}", f"{e['first_batch_ms']:.1f}"
            table.add_row(e["store"], e["loader"], "yes" if e["view"] else "no", rate, first)
        console.print(table)
    table = Table("part", "what", f"median ms per batch of {BATCH}")
    for part in ("views", "store", "rectify"):
        for name, value in result.get(part, {}).items():
            table.add_row(part, name, f"{value:.3f}")
    console.print(table)
    table = Table("bound", "limit", "measured", "holds")
    for bound in result["bounds"]:
        table.add_row(bound["what"], bound["bound"], f"{bound['got']:.3f}", "yes" if bound["holds"] else "NO")
    console.print(table)


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(PARTS)}; may be repeated")
    ] = None,
    rows: Annotated[int, typer.Option(help="images of the training split")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="turns of each loader, after a warm-up")] = 5,
    out: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS,
) -> None:
    """Measures the stream against torch's DataLoader, then views, target store and rectification by the batch."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    settings = {"batch": BATCH, "side": SIDE, "rows": rows, "window_rows": WINDOW_ROWS, "rounds": rounds}
    settings |= {"epochs_per_turn": EPOCHS}
    result: dict[str, Any] = {"settings": settings, "environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        if "stream" in chosen:
            result["stream"] = stream_part(Path(folder), rows, rounds)
        if "views" in chosen:
            result["views"] = interleaved_ms(view_calls(), rounds)
        if "store" in chosen:
            result["store"] = interleaved_ms(store_calls(Path(folder)), rounds)
        if "rectify" in chosen:
            result["rectify"] = interleaved_ms(rectify_calls(), rounds)
    result["bounds"] = bounds_of(result)
    write_json(out, result)
    show(result)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
