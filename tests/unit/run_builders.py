"""Configs and run directories that several unit tests start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krd_ray.train.rundir import MetricsLog, RunDir


def raw_run(folder: Path | str = "shards", **more: Any) -> dict[str, Any]:
    students = [{"name": "s", "model": "digits_net_4", "resources": {"num_cpus": 0.5}}]
    return {"name": "run", "data": {"dir": str(folder)}, "students": students, **more}


def train_row(epoch: int, **more: float) -> dict[str, Any]:
    """A `train` row of 100 samples: 4 s, of which 1 s waiting, 2 CPU seconds of steps, 3 in all."""
    sums = {"compute_s": 3.0, "wait_targets_s": 0.75, "wait_data_s": 0.25, "cpu_s": 3.0, "step_cpu_s": 2.0}
    counts = {"requests": 5, "retries": 1, "bytes_received": 1000}
    speed = {"loss": 1.25, "images_per_s": 25.0 + epoch}
    return {"num_samples": 100, **sums, **counts, **speed, **more}


def write_student(run: RunDir, name: str, *, epochs: int, attempts: int = 1, val: float = 0.5) -> None:
    for attempt in range(attempts):
        log = MetricsLog(run.student(name), name, attempt)
        log.write(
            "start", 0, 0, session=max(attempt - 1, 0)
        )  # the second start is a restart, the third a resume
        for epoch in range(epochs):
            log.write("train", epoch, 7, **train_row(epoch))
            log.write("val", epoch, 7, many=val, medium=None, few=0.25)
            log.write("coverage", epoch, 7, seen=99, missed=0, doubled=0, left_out=1, left_out_ids=[3])
