"""Answers what it costs when glibc gives a step's memory back to the system: `python -m benchmarks.freed_memory`.

Does not use Ray. Processes with and without the settings that krd_ray gives the workers of a cluster of its own take
turns; each measures the teacher's forward and a student's step of the speed benchmark, on one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.speed.cells import Cell
from benchmarks.speed.setting import Data, Learner, load_teacher, prepare_files
from krd_ray.train.cluster import KEEP_FREED_MEMORY
from krd_ray.train.rundir import environment, write_json

RESULTS = Path(__file__).parent / "results" / "freed_memory.json"
CELL = Cell("resnet8x4", "resnet8", 1)
WARM_UP_STEPS, STEPS = 3, 15
FORMS = {"as the system has it": {}, "kept by the process": KEEP_FREED_MEMORY}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="processes of each form")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = RESULTS,
    inside: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure CPU milliseconds and page faults of a step with and without kept memory."""
    if inside is not None:
        print(json.dumps(measured(inside)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_files(Path(folder), CELL)
        taken: dict[str, list[Any]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form, settings in FORMS.items():
                taken[form].append(_in_process(Path(folder), settings))
    names = list(taken["kept by the process"][0])
    result: dict[str, Any] = {
        form: {name: {key: median(run[name][key] for run in runs) for key in runs[0][name]} for name in names}
        for form, runs in taken.items()
    }
    before, after = result.values()
    result["ratio"] = {name: round(before[name]["cpu_ms"] / after[name]["cpu_ms"], 3) for name in names}
    write_json(out, {**result, "rounds": rounds, "settings": KEEP_FREED_MEMORY, "environment": environment()})
    for name in names:
        typer.echo(
            f"{name}: {before[name]['cpu_ms']:.0f} ms and {before[name]['faults']:.0f} page faults, kept "
            f"{after[name]['cpu_ms']:.0f} ms and {after[name]['faults']:.0f}: {result['ratio'][name]:.2f} times"
        )
    typer.echo(f"wrote {out}")


def measured(root: Path) -> dict[str, dict[str, float]]:
    """CPU milliseconds and page faults of a teacher's forward and of a student's step, medians over steps."""
    torch.set_num_threads(1)
    data = Data.load(root, CELL)
    num_classes = len(data.class_counts)
    net, learner = load_teacher(root, CELL, num_classes), Learner(CELL, num_classes, 0)
    view, labels = data.make_view(data.batches(0, 0)[0], 0)
    logits = torch.zeros(len(labels), num_classes)

    def forward() -> None:
        with torch.inference_mode():
            net(view)

    return {
        f"forward of the teacher, {CELL.teacher}": _step(forward),
        f"step of a student, {CELL.student}": _step(
            lambda: learner.step(view, labels, logits, data.class_counts)
        ),
    }


def _step(call: Callable[[], Any]) -> dict[str, float]:
    times, faults = [], []
    for _ in range(WARM_UP_STEPS + STEPS):
        before, started = getrusage(RUSAGE_THREAD).ru_minflt, time.thread_time()
        call()
        times.append((time.thread_time() - started) * 1e3)
        faults.append(getrusage(RUSAGE_THREAD).ru_minflt - before)
    return {"cpu_ms": median(times[WARM_UP_STEPS:]), "faults": float(median(faults[WARM_UP_STEPS:]))}


def _in_process(folder: Path, settings: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.freed_memory", "--inside", str(folder)]
    plain = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    done = subprocess.run(command, env=plain | settings, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    typer.run(main)
