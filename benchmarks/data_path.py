"""Answers what the data path alone costs: stream, views, target store, rectification. `python -m benchmarks.data_path`

Does not train, and starts no teacher. Everything is compared within one run, interleaved, on one torch thread;
writes benchmarks/results/data_path.json.

The peer of the stream is a torch DataLoader over the same shards, written tightly: row groups read with PyArrow,
shuffled in windows of the same size, cut into batches of uint8; it decodes encoded images anew each epoch. Both
hand over the same rows; the same view function follows. A worker is a process besides the one that trains.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from ray.data import DataContext, ExecutionResources
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from krd_ray.config import RayConfig
from krd_ray.data.plan import train_plan
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.source_arrays import ArraySource
from krd_ray.data.source_contract import RawSample
from krd_ray.data.stream import READ_CPUS, ShardSet, cache_blocks, train_batches
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.longtail import BoolArray
from krd_ray.maths.rectify import Rectifier, log_class_prior, rectify_features, rectify_logits
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.teacher.pairs import Pairs, distinct, read_pairs
from krd_ray.teacher.store import TargetStore, copy_rows
from krd_ray.train.cluster import connected
from krd_ray.train.rundir import environment, write_json

BATCH, SIDE, NUM_CLASSES = 256, 32, 10
WINDOW_ROWS = 2048
STORE_SAMPLES = 10_000
STREAM_BOUND_FRAC, STORE_BOUND_MS = 0.9, 1.0
PARTS = ("stream", "views", "store", "rectify")
RESULTS = Path(__file__).parent / "results" / "data_path.json"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEW = ViewSpec("pad_crop", SIDE, 0, MEAN, STD, pad=SIDE // 8, flip=True)
VIEWS = {
    "pad_crop": VIEW,
    "random_resized_crop": replace(
        VIEW, recipe="random_resized_crop", scale=(0.08, 1.0), ratio=(0.75, 4 / 3)
    ),
    "pad_crop + jitter": replace(VIEW, brightness=0.4, contrast=0.4, saturation=0.4),
}
Rows = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # images uint8 [B, S, S, 3], ids int64 [B], views int64 [B]


# ---- images: smooth patches with noise, so that PNG and JPEG cost about what photographs do


def synthetic_images(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """uint8 [N, SIDE, SIDE, 3]."""
    patches = generator.integers(16, 240, (len(labels), SIDE // 4, SIDE // 4, 3))
    images = patches.repeat(4, axis=1).repeat(4, axis=2)
    return (images + generator.integers(-12, 13, images.shape)).astype(np.uint8)


def imbalanced_labels(num_rows: int) -> np.ndarray:
    """int64 [N]: class c has about 100^(-c / (C - 1)) of the head's rows."""
    weights = 100.0 ** (-np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    counts = np.maximum(1, (weights / weights.sum() * num_rows).astype(np.int64))
    counts[0] += num_rows - counts.sum()
    return np.repeat(np.arange(NUM_CLASSES), counts)


@dataclass(frozen=True)
class JpegSource:
    """An array source whose images are JPEG files."""

    arrays: ArraySource

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arrays, name)

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        return map(_as_jpeg, self.arrays.iter_train(selected))

    def iter_test(self) -> Iterator[RawSample]:
        return map(_as_jpeg, self.arrays.iter_test())


def _as_jpeg(sample: RawSample) -> RawSample:
    assert isinstance(sample.image, np.ndarray)
    buffer = io.BytesIO()
    Image.fromarray(sample.image).save(buffer, format="JPEG", quality=90)
    return replace(sample, image=buffer.getvalue())


def write_splits(folder: Path, num_rows: int) -> dict[str, ShardSet]:
    """The same images three times: raw pixels, PNG, JPEG."""
    generator = np.random.default_rng(0)
    labels, test = imbalanced_labels(num_rows), np.arange(NUM_CLASSES)
    source = ArraySource(
        name="synthetic",
        classes=[str(c) for c in range(NUM_CLASSES)],
        train_NHWC=synthetic_images(labels, generator),
        train=labels,
        test_NHWC=synthetic_images(test, generator),
        test=test,
    )
    splits = {}
    for store, kind in (("raw", source), ("png", source), ("jpeg", JpegSource(source))):
        options = ShardOptions(store="raw" if store == "raw" else "encoded", image_size=SIDE, val_per_class=0)
        manifest = write_shards(kind, folder / store, options)
        splits[store] = ShardSet.open(folder / store, manifest, "train")
    return splits


# ---- the stream and its peer


class PeerRows(IterableDataset[Rows]):
    """What a careful user of PyArrow and torch writes: shuffled row groups, a window, batches by one gather."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards, self._epoch = shards, 0

    def __iter__(self) -> Iterator[Rows]:
        self._epoch += 1
        generator = np.random.default_rng(self._epoch)
        held: list[tuple[np.ndarray, np.ndarray]] = []
        left = len(self._shards.chunk_rows)
        for chunk in generator.permutation(left).tolist():
            held.append(self._read(chunk))
            left -= 1
            num_rows = sum(len(ids) for _, ids in held)
            if num_rows >= WINDOW_ROWS or left == 0:
                images, ids = (np.concatenate([part[k] for part in held]) for k in (0, 1))
                order = generator.permutation(num_rows)
                keep = num_rows % BATCH if left else 0
                for start in range(0, num_rows - keep, BATCH):
                    rows = order[start : min(start + BATCH, num_rows - keep)]
                    views = np.full(len(rows), self._epoch)
                    yield torch.from_numpy(images[rows]), torch.from_numpy(ids[rows]), torch.from_numpy(views)
                rows = order[num_rows - keep :]
                held = [(images[rows], ids[rows])]

    def _read(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._shards
        with pq.ParquetFile(Path(shards.root) / shards.files[chunk]) as file:
            table = file.read_row_group(shards.file_groups[chunk], columns=["sample_id", "label", "image"])
        column = table["image"].chunk(0)
        if shards.encoded:
            decoded = [np.asarray(Image.open(io.BytesIO(data))) for data in column.to_pylist()]
            images = np.stack(decoded)
        else:
            images = np.frombuffer(column.buffers()[1], np.uint8).reshape(len(column), SIDE, SIDE, 3)
        return images, table["sample_id"].to_numpy()


def stream_rows(shards: ShardSet, epoch: int) -> Iterator[Rows]:
    """An epoch of krd_ray's training stream."""
    plan = train_plan(shards.chunk_rows, seed=0, epoch=epoch, rank=0, world=1)
    batches = train_batches(
        shards, plan, batch_size=BATCH, seed=0, epoch=epoch, rank=0, window_rows=WINDOW_ROWS
    )
    for batch in batches:
        yield tuple(map(torch.from_numpy, (batch.images_BHWC, batch.sample_ids, batch.view_index)))  # type: ignore[misc]


def epoch_s(rows: Iterator[Rows], view: ViewSpec | None) -> tuple[float, float, int]:
    """Seconds of an epoch and to its first batch, and a sum that is the same for the same rows."""
    started, first_s, names = time.perf_counter(), 0.0, 0
    for images, ids, views in rows:
        if view is not None:
            train_view(images, ids, views, view)
        first_s = first_s or time.perf_counter() - started
        names += int((ids * ids + 1).sum())
    return time.perf_counter() - started, first_s, names


def stream_part(folder: Path, num_rows: int, rounds: int) -> list[dict[str, Any]]:
    """Rows per second of every loader over every store, with and without the view."""
    entries = []
    one_reader = DataContext.get_current().execution_options
    one_reader.resource_limits = ExecutionResources(cpu=READ_CPUS)
    with connected(RayConfig(num_cpus=1, object_store_bytes=512 << 20)):
        for store, shards in write_splits(folder, num_rows).items():
            cached = cache_blocks(shards)
            peers = {
                workers: DataLoader(
                    PeerRows(shards),
                    batch_size=None,
                    num_workers=workers,
                    persistent_workers=workers > 0,
                    multiprocessing_context="spawn" if workers else None,
                )
                for workers in (0, 1)
            }
            loaders: dict[str, Callable[[int], Iterator[Rows]]] = {
                "krd cached": lambda epoch, shards=cached: stream_rows(shards, epoch),
                "krd streamed": lambda epoch, shards=shards: stream_rows(shards, epoch),
                "torch, 0 workers": lambda _, peer=peers[0]: iter(peer),
                "torch, 1 worker": lambda _, peer=peers[1]: iter(peer),
            }
            entries += measured_loaders(store, loaders, shards.num_rows, rounds)
            del peers, loaders
    return entries


def measured_loaders(
    store: str, loaders: dict[str, Callable[[int], Iterator[Rows]]], num_rows: int, rounds: int
) -> list[dict[str, Any]]:
    """Epochs of all loaders in turn; the first round warms up and does not count."""
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    seen = set()
    for number in range(rounds + 1):
        for name in rotated(list(loaders), number):
            for with_view in (False, True):
                total, first, names = epoch_s(loaders[name](number), VIEW if with_view else None)
                seen.add(names)
                if number:
                    times.setdefault((name, with_view), []).append((total, first))
    assert len(seen) == 1, "a loader gave other rows than the others"
    return [
        {
            "store": store,
            "loader": name,
            "view": with_view,
            "rows_per_s": round(num_rows / median(total for total, _ in taken)),
            "first_batch_ms": round(1e3 * median(first for _, first in taken), 2),
            "epochs_s": [round(total, 4) for total, _ in taken],
        }
        for (name, with_view), taken in times.items()
    ]


# ---- the parts of a batch


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
            spec = Rectifier(features=form)  # type: ignore[arg-type]
            calls[f"features {form}, {size}"] = lambda _, f=features, y=labels, c=calibration, spec=spec: (
                rectify_features(f, y, c, spec)
            )
    return calls


# ---- bounds and output


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
    rounds: Annotated[int, typer.Option(min=1, help="epochs of each loader, after a warm-up")] = 5,
    out: Annotated[Path, typer.Option(help="where the figures go")] = RESULTS,
) -> None:
    """Measures the stream against torch's DataLoader, then views, target store and rectification by the batch."""
    chosen = part or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    settings = {"batch": BATCH, "side": SIDE, "rows": rows, "window_rows": WINDOW_ROWS, "rounds": rounds}
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
