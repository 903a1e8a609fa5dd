"""Answers what one batch costs on its way through views, target store and teacher actor; `make bench` runs it.

Does not train and does not compare with other frameworks. Writes benchmarks/results/teacher_path.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from krd_ray.config import RayConfig, Resources
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.data.stream import eval_batches
from krd_ray.maths.rectify import Rectifier
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.models.registry import build_model
from krd_ray.teacher.client import TeacherClient
from krd_ray.teacher.group import TeacherGroup
from krd_ray.teacher.ports import ActorPort
from krd_ray.teacher.spec import TeacherSpec
from krd_ray.teacher.store import TargetStore, copy_rows
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.cluster import connected
from krd_ray.train.rundir import environment, write_json

BATCH = 256
RESULTS = Path(__file__).parent / "results" / "teacher_path.json"


def timed_ms(call: Callable[[int], Any], repeats: int) -> float:
    """Median milliseconds of call(0), call(1), ...; the first fifth warms up and does not count."""
    times = []
    for number in range(repeats):
        started = time.perf_counter()
        call(number)
        times.append((time.perf_counter() - started) * 1e3)
    return median(times[repeats // 5 :])


def store_ms(width: int = 164, num_samples: int = 10_000) -> float:
    """Lookup and gather of one batch from a warm store in memory."""
    with tempfile.TemporaryDirectory() as folder:
        ids = np.arange(num_samples)
        store = TargetStore(Path(folder), "bench", ids, width, memory_bytes=1 << 30, disk_bytes=0)
        generator = np.random.default_rng(0)
        store.put(0, generator.permutation(num_samples), np.zeros((num_samples, width), np.float16))

        def gather(_: int) -> None:
            position = store.index(generator.choice(num_samples, BATCH, replace=False))
            copy_rows(store.locate(store.rows(0, position)), BATCH, width)

        return timed_ms(gather, 500)


def view_ms(side: int = 32) -> float:
    """Pad-crop and flip of one batch on one CPU thread."""
    spec = ViewSpec("pad_crop", side, 0, (0.5,) * 3, (0.25,) * 3, pad=side // 8, flip=True)
    images, ids = torch.zeros(BATCH, side, side, 3, dtype=torch.uint8), torch.arange(BATCH)
    return timed_ms(lambda view: train_view(images, ids, view, spec), 100)


def actor_ms(folder: Path) -> dict[str, float]:
    """Round trip of one batch to a teacher actor: computed for it, and found in the store."""
    options = ShardOptions(imbalance_ratio=2, store="raw", image_size=8)
    manifest = write_shards(open_source(SourceSpec(kind="digits")), folder / "shards", options)
    shards = ShardSet.open(folder / "shards", manifest, "train")
    mean, std = tuple(manifest.mean), tuple(manifest.std)
    net = build_model("digits_net_32", num_classes=10, image_size=8, seed=0)
    card = ModelCard("digits_net_32", 10, 8, mean, std, manifest.content_hash)  # type: ignore[arg-type]
    save_weights(net.state_dict(), card, folder / "teacher.safetensors")
    (folder / "teacher").mkdir()
    spec = TeacherSpec(
        weights=str(folder / "teacher.safetensors"),
        model=None,
        view=ViewSpec("pad_crop", 8, 0, mean, std, pad=1),  # type: ignore[arg-type]
        shards=shards,
        dataset_hash=manifest.content_hash,
        class_counts=tuple(manifest.splits["train"].class_counts),
        replica=0,
        num_replicas=1,
        micro_batch=64,
        queue_rows=8192,
        memory_bytes=1 << 30,
        disk_bytes=0,
        persist=False,
        precision="fp32",
        compile="off",
        num_threads=1,
        device="cpu",
        store_dir=str(folder / "store"),
        run_dir=str(folder / "teacher"),
        calibration=str(folder / "teacher" / "calibration.safetensors"),
    )
    with connected(RayConfig(object_store_bytes=256 << 20)):
        group = TeacherGroup([spec], Resources(), num_callers=4, name="bench")
        info = group.start(shards, np.zeros((2, 8, 8, 3), np.uint8), min_accuracy=0.0)
        batch = next(iter(eval_batches(shards, batch_size=BATCH)))
        ports = [ActorPort(replica) for replica in group.replicas]
        client = TeacherClient(ports, info.teacher_hash, "bench", Rectifier(), in_flight=1, timeout_s=60)

        def ask(batch: Batch, view: int) -> None:
            list(client.stream(iter([replace(batch, view_index=np.full(len(batch), view))])))

        computed = timed_ms(lambda view: ask(batch, view), 50)
        found = timed_ms(lambda _: ask(batch, 0), 200)
        group.close()
    return {"round_trip_computed_ms": computed, "round_trip_found_ms": found}


def main() -> None:
    """Measures views, store and actor round trip for batches of 256, on this machine, one thread each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {"store_gather_ms": store_ms(), "view_32px_ms": view_ms(), **actor_ms(Path(folder))}
    write_json(RESULTS, {"batch": BATCH, "medians": figures, "environment": environment()})
    table = Table("figure", f"median ms per batch of {BATCH}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    typer.echo(f"wrote {RESULTS}")


if __name__ == "__main__":
    typer.run(main)
