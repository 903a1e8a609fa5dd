"""Answers where everything of a run lies on disk, and reads and writes it safely.

Does not interpret what it stores. JSON is written to a neighbour and renamed; metric rows are appended.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from krd_ray.atomic import naming_a_full_disk, write_text
from krd_ray.errors import KrdError, RunError
from krd_ray.storage.working_copy import WorkingCopy, working_copy

OF_RAY_TRAIN = "ray_train"  # folder of what Ray Train itself writes about a group of workers
GPUS = Path("/proc/driver/nvidia/gpus")
PACKAGES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "krd-ray")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run; a search keeps its trials where a run keeps its students.

    Args:
        root: the folder on this node.
        members: name of the folder of its students.
        copy: what `root` is the working copy of; None: the folder is the run's own place.
    """

    root: Path
    members: str = "students"
    copy: WorkingCopy | None = None

    @property
    def place(self) -> str:
        """Returns where the run lies: path or URI."""
        return self.copy.place if self.copy else str(self.root)

    def place_of(self, path: Path) -> str:
        """Returns where a file of the run lies for every node."""
        return self.copy.place_of(path) if self.copy else str(path)

    def sync(self) -> None:
        """Makes the working copy and the run's place equal."""
        if self.copy:
            self.copy.sync()

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.json"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.json"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    def student(self, name: str) -> StudentDir:
        """Returns the folder of one student."""
        return StudentDir(self.root / self.members / name)

    def create(self) -> None:
        """Makes the folder; refuses one that another run has used.

        Raises:
            RunError: the folder holds a run already.
        """
        if self.config.exists():
            raise RunError(
                f"{self.place} holds a run already; continue it with `krd distill --resume {self.place}`, "
                "or choose another run_dir"
            )
        self.make_folders()

    def make_folders(self) -> None:
        """Makes the folders that everything else is written to."""
        self.teacher.mkdir(parents=True, exist_ok=True)
        (self.root / self.members).mkdir(exist_ok=True)

    def require(self) -> None:
        """Raises RunError unless this is the folder of a run."""
        if not self.config.is_file():
            raise RunError(f"{self.place} is not a run directory: it has no config.yaml")


@contextmanager
def open_run(place: str | Path) -> Iterator[RunDir]:
    """The run at a path or URI; what is written into its folder is at its place when the block has ended."""
    with working_copy(place) as copy:
        yield RunDir(copy.path, copy=copy)


@dataclass(frozen=True)
class StudentDir:
    """The folder of one student of a run."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def error(self) -> Path:
        return self.root / "error.json"

    @property
    def stop(self) -> Path:
        """Its presence asks the student to end before its last epoch; a search stops trials so."""
        return self.root / "stop"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.root / "model.safetensors"

    def write_error(self, error: KrdError) -> None:
        """Writes what would only happen again, so that this student is not started a second time."""
        write_json(self.error, {"kind": type(error).__name__, "message": error.message})

    def rows(self) -> list[dict[str, Any]]:
        """Returns the metric rows written so far; a half-written last line is left out."""
        return self.rows_after(0)[0]

    def rows_after(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Returns the complete rows behind a byte offset, and the offset to go on from."""
        if not self.metrics.is_file():
            return [], offset
        with self.metrics.open("rb") as file:
            file.seek(offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        return [json.loads(line) for line in complete.splitlines()], offset + len(complete)

    def next_attempt(self) -> int:
        """Returns the number of the attempt that starts now: 0, then one more for every start before."""
        return 1 + max((row["attempt"] for row in self.rows()), default=-1)


def num_sessions(rows: Sequence[dict[str, Any]]) -> int:
    """Returns how often a driver has started this student."""
    return len({row["session"] for row in rows if row["split"] == "start"})


def num_restarts(rows: Sequence[dict[str, Any]]) -> int:
    """Returns how often Ray had to start its workers again; a resumed run is no restart."""
    return len([row for row in rows if row["split"] == "start"]) - num_sessions(rows)


def seconds_trained(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the time between first and last row, added up over attempts: pauses between them do not count."""
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row["attempt"], []).append(row["time"])
    return sum(max(moments) - min(moments) for moments in times.values())


class MetricsLog:
    """Appends metric rows of one student; one line, one write."""

    def __init__(self, folder: StudentDir, student: str, attempt: int) -> None:
        folder.root.mkdir(parents=True, exist_ok=True)
        _end_last_line(folder.metrics)
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._fixed = {"student": student, "attempt": attempt}

    def write(self, split: str, epoch: int, step: int, **values: Any) -> None:
        """Appends one row."""
        row = {"time": time.time(), **self._fixed, "epoch": epoch, "step": step, "split": split, **values}
        with naming_a_full_disk(Path(self._file.name)):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file of the run."""
    return json.loads(path.read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Returns what the run depends on outside its config: versions, cores, cards, platform."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": str(os.cpu_count()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": ", ".join(_gpu_models()) or "none",
        **versions,
    }


def _gpu_models() -> list[str]:
    """Names of this machine's NVIDIA cards as the driver gives them; torch would take memory of each to say them."""
    lines = [line for file in sorted(GPUS.glob("*/information")) for line in file.read_text().splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def _end_last_line(path: Path) -> None:
    """Cuts off the half line that a killed writer may have left."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
