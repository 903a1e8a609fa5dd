"""Answers what krd_ray does, in two minutes on a laptop: digits-LT, a teacher, six students, a report.

Does nothing that the other verbs do not: it calls them one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from krd_ray.config import RayConfig, RunConfig
from krd_ray.config_io import load_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.report.page import build_report
from krd_ray.storage.places import require_folder
from krd_ray.train.assess import evaluate_run
from krd_ray.train.cluster import connected
from krd_ray.train.run import Outcome, start_run

OPTIONS = ShardOptions(
    imbalance_ratio=20,
    n_max=120,
    val_per_class=10,
    store="raw",
    image_size=8,
    rows_per_shard=256,
    row_group_rows=64,
)
OBJECT_STORE_BYTES = 256 << 20


def demo_config(name: str, shards: Path, out: Path) -> RunConfig:
    """Returns one of the demo's configs (`teacher` or `students`) with its run directory below `out`."""
    settings = [f"data.dir={shards}", f"run_dir={out / name}"]
    if name == "students":
        settings.append(f"teacher.weights={out / 'teacher/students/teacher/model.safetensors'}")
    return load_config(Path(__file__).parent / f"{name}.yaml", settings)


def run_demo(out: Path, say: Callable[[str], None]) -> tuple[Outcome, Path]:
    """Runs the demo below `out` and returns the students' outcome and the report's path."""
    out = require_folder(out, "--out")
    this_time = out / time.strftime("%Y%m%d-%H%M%S")
    manifest = write_shards(open_source(SourceSpec(kind="digits")), out / "shards", OPTIONS)
    sizes = ", ".join(f"{group} {size}" for group, size in manifest.group_sizes().items())
    say(f"digits-LT: {manifest.splits['train'].num_rows} training images, classes per group: {sizes}")
    with connected(RayConfig(object_store_bytes=OBJECT_STORE_BYTES)):
        start_run(demo_config("teacher", out / "shards", this_time))
        outcome = start_run(demo_config("students", out / "shards", this_time))
        evaluate_run(outcome.run.root)
    return outcome, build_report(outcome.run.root)
