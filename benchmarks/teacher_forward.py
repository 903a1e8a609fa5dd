"""Answers how a teacher forwards fastest on this device: plain, recorded or compiled, in micro-batches of which size.

Does not start Ray. `python -m benchmarks.teacher_forward` prints a table and writes it as JSON. Each figure is of the
whole way of a micro-batch: pixels to the device, views, forward, float16 rows back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.entry import run_command
from krd_ray.maths.views import ViewSpec
from krd_ray.models.registry import build_model
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.recorded import Compile
from krd_ray.train.rundir import environment, write_json

RESULT = Path(__file__).parent / "results" / "teacher_forward.json"
HOW: tuple[Compile, ...] = ("off", "cuda_graph", "inductor")
CLASSES, MEAN, STD = 100, (0.5,) * 3, (0.25,) * 3
WARM_UP_CALLS, TURNS, TURN_S = 3, 5, 0.2


def main(
    model: Annotated[list[str] | None, typer.Option(help="teacher, as name@side; may be repeated")] = None,
    micro_batch: Annotated[list[int] | None, typer.Option(help="rows of a forward; may be repeated")] = None,
    result: Annotated[Path, typer.Option(help="JSON file of all figures")] = RESULT,
) -> None:
    """Measure images per second of teachers on a GPU if there is one, else on the CPU; the ways take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = HOW if device.type == "cuda" else ("off", "inductor")
    if device.type == "cuda":
        torch.set_num_threads(1)
    rows = []
    for name in model or ["resnet32x4@32", "torchvision:resnet50@224"]:
        for size in micro_batch or [64, 128, 256]:
            rows.append(_measure(name, size, ways, device))
            shown = ", ".join(f"{how} {row_s:.0f}" for how, row_s in rows[-1]["images_per_s"].items())
            typer.echo(f"{name}, micro_batch {size}: images/s {shown}; ready after {rows[-1]['start_s']}")
    write_json(result, {"device": device.type, "rows": rows, "environment": environment()})


def _measure(name: str, size: int, ways: tuple[Compile, ...], device: torch.device) -> dict[str, Any]:
    model, _, side = name.rpartition("@")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (size, int(side), int(side), 3), np.uint8)
    ids = np.arange(size)
    calls: dict[str, Callable[[], Any]] = {}
    start_s: dict[str, float] = {}
    for way in ways:
        started = time.perf_counter()
        forward = _teacher(model, int(side), size, way, device)
        for view in range(WARM_UP_CALLS):
            forward(images, ids, np.full(size, view))
        calls[way] = lambda forward=forward: forward(images, ids, np.zeros(size, np.int64))
        start_s[way] = round(time.perf_counter() - started, 1)
    turns: dict[str, list[float]] = {how: [] for how in ways}
    for _ in range(TURNS):
        for how, call in calls.items():
            turns[how].append(size * _calls_per_s(call))
    rates = {how: median(each) for how, each in turns.items()}
    return {"model": name, "micro_batch": size, "images_per_s": rates, "turns": turns, "start_s": start_s}


def _teacher(model: str, side: int, size: int, how: Compile, device: torch.device) -> TeacherForward:
    net = build_model(model, num_classes=CLASSES, image_size=side, seed=0).eval().requires_grad_(False)
    view = ViewSpec("pad_crop", side, 0, MEAN, STD, pad=4, flip=True)
    bf16 = device.type == "cuda"
    return TeacherForward(net, None, view, device=device, bf16=bf16, micro_batch=size, compile=how)


def _calls_per_s(call: Callable[[], Any]) -> float:
    """Every call ends with its rows on the CPU: nothing is left in a card's queue."""
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < TURN_S:
        call()
        number += 1
    return number / (time.perf_counter() - started)


if __name__ == "__main__":
    run_command(main)
