"""Answers how things are timed in turns, and with which batch and views."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.data_path.images import SIDE
from krd_ray.maths.views import ViewSpec

BATCH = 256
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEW = ViewSpec("pad_crop", SIDE, 0, MEAN, STD, pad=SIDE // 8, flip=True)
VIEWS = {
    "pad_crop": VIEW,
    "random_resized_crop": replace(
        VIEW, recipe="random_resized_crop", scale=(0.08, 1.0), ratio=(0.75, 4 / 3)
    ),
    "pad_crop + jitter": replace(VIEW, brightness=0.4, contrast=0.4, saturation=0.4),
}


def interleaved_ms(
    calls: dict[str, Callable[[int], Any]], rounds: int, repeats: int = 30
) -> dict[str, float]:
    """Median over rounds of the median milliseconds of a call; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in rotated(list(calls), number):
            taken = []
            for repeat in range(repeats):
                started = time.perf_counter()
                calls[name](number * repeats + repeat)
                taken.append((time.perf_counter() - started) * 1e3)
            if number:
                times[name].append(median(taken))
    return {name: round(median(values), 4) for name, values in times.items()}


def rotated(names: list[str], number: int) -> list[str]:
    """The names from another one on in each round, so that none always follows the same neighbour."""
    at = number % len(names)
    return names[at:] + names[:at]
