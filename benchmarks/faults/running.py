"""Answers how one run goes on while something happens to it: its command, its records, all of its processes.

Does not know which faults there are and judges nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.faults.nodes import Nodes
from benchmarks.faults.setting import ENVIRONMENT, KRD, MARK
from krd_ray.errors import KrdError
from krd_ray.train.rundir import RunDir

TIMEOUT_S = 240.0
LOOK_S = 0.05
GRACE_S = 20.0  # in which the processes of a run that has ended must be gone
Row = dict[str, Any]


@dataclass
class Scene:
    """One run of `krd distill` that something happens to.

    Args:
        run: its directory.
        config: file of its config.
        folder: for what the harness writes besides.
        mark: in the environment of all its processes.
        draws: for random moments, the same at each call of the harness.
        repetition: number of this run of its fault.
        nodes: of a cluster that the harness started; None: the command starts Ray itself.
    """

    run: RunDir
    config: Path
    folder: Path
    mark: str
    draws: random.Random
    repetition: int
    nodes: Nodes | None = None
    struck_at: float = 0.0
    restored_at: float = 0.0
    ended_at: float = 0.0
    outputs: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    notes: Row = field(default_factory=dict)

    def start(self, *words: str | Path) -> None:
        """Starts a `krd` command in a process group of its own; its output goes to a file."""
        log = (self.folder / f"output-{len(self.outputs)}.txt").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [*KRD, *map(str, words)],
            env=os.environ | ENVIRONMENT | {MARK: self.mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        log.close()
        self.outputs.append(log.name)

    def finish(self) -> None:
        """Waits for the end of the command; one that does not end is killed, which its exit code shows."""
        assert self.process is not None
        try:
            self.exit_codes.append(self.process.wait(timeout=TIMEOUT_S))
        except subprocess.TimeoutExpired:
            self.kill_all()
            self.exit_codes.append(self.process.wait())
        self.outputs[-1] = Path(self.outputs[-1]).read_text(encoding="utf-8")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Polls until the condition holds and returns its value.

        Raises:
            KrdError: the command has ended before, or nothing happened for too long.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if value := condition():
                return value
            if self.process is not None and self.process.poll() is not None:
                raise KrdError(f"the command ended with {self.process.returncode} before {what}")
            time.sleep(LOOK_S)
        raise KrdError(f"{what} did not come in {TIMEOUT_S:.0f} s")

    def reach(self, student: str, epoch: int) -> None:
        """Waits until a student has done that many epochs, and then for a random part of one more."""
        rows = self.wait(lambda: self._epochs_if(student, epoch), f"epoch {epoch} of {student}")
        times = [row["time"] for row in rows]
        time.sleep(self.draws.uniform(0, 1) * (times[-1] - times[0]) / len(times))

    def rows(self, student: str, split: str) -> list[Row]:
        """A student's metric rows of one split."""
        return [row for row in self.run.student(student).rows() if row["split"] == split]

    def teacher_rows(self) -> list[Row]:
        """Statistics of replica 0, oldest first; the half line of a killed process is left out."""
        path = self.run.teacher / "stats-0.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def pid_of(self, student: str) -> int:
        """The process of a student's first worker, by the last row it wrote at its start."""
        return int(self.rows(student, "start")[-1]["pid"])

    def pid_of_teacher(self) -> int:
        """The process of the teacher's replica 0, by its statistics."""
        return int(self.teacher_rows()[-1]["pid"])

    def strike(self) -> None:
        """Notes the moment of the fault."""
        self.struck_at = time.time()

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from this scene's commands and cluster."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def kill_all(self) -> None:
        """kill -9 of all of them at once."""
        found = self.processes()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        own = (
            self.process.pid if self.process else None
        )  # waiting here would take its exit code from `finish`
        psutil.wait_procs([process for process in found if process.pid != own], timeout=GRACE_S)

    def left_over(self) -> int:
        """Processes that are still there some time after the command has ended."""
        if self.nodes is not None:
            return 0  # the cluster is the harness's own and goes on
        _, alive = psutil.wait_procs(self.processes(), timeout=GRACE_S)
        return len(alive)

    def _epochs_if(self, student: str, epoch: int) -> list[Row]:
        rows = self.rows(student, "coverage")
        return rows if len(rows) >= epoch else []

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return bool(
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(MARK) == self.mark
            )
        except psutil.Error:  # it has ended since, or is not ours to look into
            return False


@contextmanager
def short_ray_folder() -> Iterator[None]:
    """Ray's sockets in a folder of this run's own: their paths may have 107 bytes."""
    folder, before = tempfile.mkdtemp(prefix="kf", dir="/tmp"), os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        del os.environ["RAY_TMPDIR"]
        if before is not None:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
