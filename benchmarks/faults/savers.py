"""Answers how each kind of file of the project is saved and read back, so that a kill in between can be tried.

Does not kill (`atomic` does). What is saved the n-th time says n in all its parts: a mixture is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from krd_ray.atomic import write_bytes
from krd_ray.data.manifest import Manifest
from krd_ray.errors import KrdError
from krd_ray.maths.calibration import Calibration
from krd_ray.models.registry import build_model
from krd_ray.report.writing import csv_bytes
from krd_ray.teacher.calibrate import load_calibration, save_calibration
from krd_ray.teacher.store import TargetStore
from krd_ray.teacher.weights import ModelCard, read_weights, save_weights
from krd_ray.train.checkpoint import Position, restore_checkpoint, save_checkpoint
from krd_ray.train.rundir import read_json, write_json

MODEL, CLASSES = "digits_net_8", 10
ROWS, WIDTH = 64, 32
NOTHING = -1
Save = Callable[[int], None]


@dataclass(frozen=True)
class Saver:
    """One kind of file.

    Args:
        open: folder -> a function that saves the n-th content there; called in the process that is killed.
        load: folder -> the n that is found, -1 where nothing has been saved; raises when it cannot be read.
    """

    open: Callable[[Path], Save]
    load: Callable[[Path], int]


class MixedError(KrdError):
    """A file that can be read holds parts of two contents."""


def _one(numbers: object) -> int:
    """The number that all parts name."""
    found = set(np.asarray(numbers).ravel().tolist())
    if len(found) != 1:
        raise MixedError(f"parts of {len(found)} contents in one file: {sorted(found)[:4]}")
    return int(found.pop())


def _open_json(folder: Path) -> Save:
    return lambda n: write_json(folder / "result.json", {"status": "finished", "parts": [n] * 2000})


def _load_json(folder: Path) -> int:
    path = folder / "result.json"
    return _one(read_json(path)["parts"]) if path.exists() else NOTHING


def _open_csv(folder: Path) -> Save:
    return lambda n: write_bytes(folder / "headline.csv", csv_bytes([{"n": n}] * 2000))


def _load_csv(folder: Path) -> int:
    path = folder / "headline.csv"
    return _one([int(line) for line in path.read_text().split()[1:]]) if path.exists() else NOTHING


def _open_manifest(folder: Path) -> Save:
    def save(n: int) -> None:
        shards = [
            {"file": f"train-{k:05}.parquet", "num_rows": 1 + n, "row_groups": [1 + n], "num_bytes": 1}
            | {"sha256": f"{n:064x}"}
            for k in range(100)
        ]
        rows = 100 * (1 + n)
        content = {
            "source": {"kind": "digits"},
            "options": {},
            "classes": ["a"],
            "num_classes": 1,
            "image": {"store": "raw", "height": 8, "width": 8},
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "long_tail": {
                "profile": "source", "imbalance_ratio": None, "n_max": None, "seed": 0,
                "class_order": "index", "val_policy": "auto", "val_per_class": 0,
            },
            "splits": {"train": {"num_rows": rows, "class_counts": [rows], "shards": shards}},
            "num_skipped": 0,
            "warnings": [],
        }  # fmt: skip
        Manifest.model_validate(content).save(folder)

    return save


def _load_manifest(folder: Path) -> int:
    if not (folder / "dataset.json").exists():
        return NOTHING
    return _one([int(shard.sha256, 16) for shard in Manifest.load(folder).splits["train"].shards])


def _open_weights(folder: Path) -> Save:
    shapes = build_model(MODEL, num_classes=CLASSES, image_size=8, seed=0).state_dict()
    card = ModelCard(MODEL, CLASSES, 8, (0.5,) * 3, (0.5,) * 3, "0")

    def save(n: int) -> None:
        state = {name: torch.full(tuple(tensor.shape), float(n)) for name, tensor in shapes.items()}
        save_weights(state, card, folder / "model.safetensors")

    return save


def _load_weights(folder: Path) -> int:
    path = folder / "model.safetensors"
    if not path.exists():
        return NOTHING
    state, card = read_weights(path)
    if card is None:
        raise MixedError(f"{path} has lost its card")
    return _one(torch.cat([tensor.flatten() for tensor in state.values()]))


def _open_calibration(folder: Path) -> Save:
    means, counts = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(0)), torch.ones(CLASSES)
    calibration = Calibration.from_means(means, counts.long())
    return lambda n: save_calibration(calibration, "hash", float(n), folder / "calibration.safetensors")


def _load_calibration(folder: Path) -> int:
    found = load_calibration(folder / "calibration.safetensors", "hash")
    return NOTHING if found is None else int(found[1])


def _store(folder: Path) -> TargetStore:
    return TargetStore(
        folder / "store",
        "key",
        np.arange(ROWS),
        WIDTH,
        memory_bytes=1 << 20,
        disk_bytes=1 << 20,
        persist=True,
    )


def _targets(view: int) -> np.ndarray:
    return np.full((ROWS, WIDTH), view % 2048, np.float16)


def _open_store(folder: Path) -> Save:
    store = _store(folder)
    return lambda n: store.put(n, np.arange(ROWS), _targets(n))


def _load_store(folder: Path) -> int:
    """The newest whole view; every row that the store says it holds must be the one that was put there."""
    store, newest = _store(folder), NOTHING
    for path in (folder / "store").glob("view-*.rows"):
        view, everything = int(path.stem.removeprefix("view-")), np.arange(ROWS)
        rows = store.rows(view, everything)
        for page, offsets, _ in store.locate(rows[rows >= 0]):
            if not np.array_equal(page[offsets], _targets(view)[: len(offsets)]):
                raise MixedError(f"view {view} of the store holds other rows than were put there")
        if store.was_computed(view, everything).all():
            newest = max(newest, view)
    store.close()
    return newest


def _parts() -> dict[str, torch.nn.Module]:
    return {"student": build_model(MODEL, num_classes=CLASSES, image_size=8, seed=0)}


def _open_checkpoint(folder: Path) -> Save:
    parts = _parts()

    def save(n: int) -> None:
        for tensor in parts["student"].state_dict().values():
            tensor.fill_(n)
        save_checkpoint(folder / "checkpoints", Position(n, n), parts)

    return save


def _load_checkpoint(folder: Path) -> int:
    parts = _parts()
    found = restore_checkpoint(folder / "checkpoints", parts, torch.device("cpu"))
    if found.epoch == NOTHING:
        return NOTHING
    tensors = [tensor.flatten().float() for tensor in parts["student"].state_dict().values()]
    return _one([found.epoch, found.step, _one(torch.cat(tensors))])


SAVERS: dict[str, Saver] = {
    "run record": Saver(_open_json, _load_json),
    "table": Saver(_open_csv, _load_csv),
    "manifest": Saver(_open_manifest, _load_manifest),
    "weights": Saver(_open_weights, _load_weights),
    "calibration": Saver(_open_calibration, _load_calibration),
    "target store": Saver(_open_store, _load_store),
    "checkpoint": Saver(_open_checkpoint, _load_checkpoint),
}
