"""Answers what the parts of a batch cost on their own: its view, its lookup in the store, its rectification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_path.images import SIDE
from benchmarks.data_path.turns import BATCH, VIEWS
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.rectify import Rectifier, log_class_prior, rectify_features, rectify_logits
from krd_ray.maths.views import train_view
from krd_ray.teacher.pairs import Pairs, distinct, read_pairs
from krd_ray.teacher.store import TargetStore, copy_rows

STORE_SAMPLES = 10_000


def view_calls() -> dict[str, Callable[[int], Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(BATCH) * 7
    return {name: lambda view, spec=spec: train_view(images, ids, view, spec) for name, spec in VIEWS.items()}


def store_calls(folder: Path) -> dict[str, Callable[[int], Any]]:
    """Lookup of (view, sample) pairs and gather of their rows, every row there; two views in turn."""
    calls: dict[str, Callable[[int], Any]] = {}
    for width in (164, 2148):
        for place in ("memory", "disk"):
            budgets = {"memory_bytes": 1 << 30, "disk_bytes": 0}
            if place == "disk":
                budgets = {"memory_bytes": 0, "disk_bytes": 1 << 30}
            store = TargetStore(
                folder / f"{width}-{place}",
                "benchmark",
                np.arange(STORE_SAMPLES) * 3,
                width,
                persist=place == "disk",
                **budgets,
            )
            generator = np.random.default_rng(0)
            for view in (0, 1):
                rows = np.full((STORE_SAMPLES, width), view, np.float16)
                store.put(view, generator.permutation(STORE_SAMPLES), rows)
            calls[f"{place}, width {width}"] = lambda number, store=store, width=width: look_up(
                store, number, width
            )
    return calls


def look_up(store: TargetStore, number: int, width: int) -> np.ndarray:
    """What the engine does for a request whose rows are all there."""
    ids = np.random.default_rng(number).choice(STORE_SAMPLES, BATCH, replace=False) * 3
    asked = Pairs(np.full(BATCH, number % 2), store.index(ids))
    assert distinct(asked, store.num_samples) is None
    rows = read_pairs(asked, store.rows, np.int64)
    found = copy_rows(store.locate(rows), BATCH, width)
    assert found[0, 0] == number % 2
    return found


def rectify_calls() -> dict[str, Callable[[int], Any]]:
    """Rectification of one batch of raw float16 outputs, to float32."""
    calls: dict[str, Callable[[int], Any]] = {}
    for num_classes, dim in ((100, 64), (1000, 2048)):
        generator = torch.Generator().manual_seed(0)
        counts = torch.linspace(500, 5, num_classes).to(torch.int64)
        means = torch.randn(num_classes, dim, generator=generator)
        calibration = Calibration.from_means(means, counts)
        labels = torch.randint(0, num_classes, (BATCH,), generator=generator)
        raw = torch.randn(BATCH, num_classes + dim, generator=generator).to(torch.float16)
        logits, features = raw[:, :num_classes], raw[:, num_classes:]
        prior = log_class_prior(counts)
        size = f"C={num_classes}, D={dim}"
        calls[f"logits, {size}"] = lambda _, z=logits, y=labels, prior=prior: rectify_logits(
            z, y, prior, tau_prior=1.5, exchange=True
        )
        for form in ("teacher", "balanced"):
            spec = Rectifier(features=form)
            calls[f"features {form}, {size}"] = lambda _, f=features, y=labels, c=calibration, spec=spec: (
                rectify_features(f, y, c, spec)
            )
    return calls
