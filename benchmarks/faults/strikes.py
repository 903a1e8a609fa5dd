"""Answers how each fault is done to a run: real signals to real processes, a real full disk, really cut files.

Does not say what must come of it (`registry` does).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil  # type: ignore[import-untyped]

from benchmarks.faults.filler import READY
from benchmarks.faults.running import Scene
from krd_ray.errors import KrdError

FIRST_EPOCH = 4  # of the first repetition; each further one strikes later
EPOCHS_LATER = 3
PAUSE_S = 6.0
FILLER_BYTES = 240 << 20  # three times the object store
FILLER = "filler.bin"
Strike = Callable[[Scene], None]


def kill_teacher(times: int) -> Strike:
    """kill -9 of the teacher's process, again as soon as it serves again and students have gone on."""

    def strike(scene: Scene) -> None:
        for number in range(times):
            _reach(scene, later=2 * number)
            pid = scene.pid_of_teacher()
            scene.strike()
            os.kill(pid, signal.SIGKILL)
            scene.wait(lambda pid=pid: scene.pid_of_teacher() != pid, "the teacher's restart")

    return strike


def kill_student(scene: Scene) -> None:
    """kill -9 of the process of `hit`'s rank 0."""
    _reach(scene)
    scene.strike()
    os.kill(scene.pid_of("hit"), signal.SIGKILL)


def signal_driver(number: signal.Signals) -> Strike:
    """A signal to the command's process alone."""

    def strike(scene: Scene) -> None:
        _reach(scene)
        assert scene.process is not None
        scene.strike()
        os.kill(scene.process.pid, number)

    return strike


def kill_everything(scene: Scene) -> None:
    """kill -9 of the driver, Ray's own processes and all workers at once."""
    _reach(scene)
    scene.strike()
    scene.kill_all()


def stop_for_a_while(who: str) -> Strike:
    """SIGSTOP, and SIGCONT some seconds later, of a student's process, the teacher's, or all of a node."""

    def strike(scene: Scene) -> None:
        _reach(scene)
        scene.strike()
        found = _processes(scene, who)
        for process in found:
            process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_S)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        scene.restored_at = time.time()

    return strike


def lose_node(name: str) -> Strike:
    """kill -9 of all processes of a node; another one of the same shape joins."""

    def strike(scene: Scene) -> None:
        _reach(scene)
        assert scene.nodes is not None
        scene.strike()
        scene.nodes.kill(name)
        scene.nodes.add(name)

    return strike


def crowd_object_store(scene: Scene) -> None:
    """Another job puts three times the size of the object store into it, so that what lies there is spilled."""
    assert scene.nodes is not None
    command = [sys.executable, "-m", "benchmarks.faults.filler", scene.nodes.address, str(FILLER_BYTES)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as filler:
        assert filler.stdout is not None
        while filler.stdout.readline().strip() != READY:
            if filler.poll() is not None:
                raise KrdError("the job that fills the object store could not start")
        _reach(scene)
        scene.strike()
        said, _ = filler.communicate("go\n", timeout=60)
    scene.notes["spilled_bytes"] = int(said.splitlines()[-1])
    if filler.returncode or scene.notes["spilled_bytes"] == 0:
        raise KrdError(f"the object store was not filled: {said}")
    scene.restored_at = scene.struck_at


def fill_disk(scene: Scene) -> None:
    """Takes every free byte of the disk that the run directory is on."""
    _reach(scene)
    scene.strike()
    with (scene.run.root.parent / FILLER).open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            _write_until_full(file, size)


def free_disk(scene: Scene) -> None:
    """Gives the bytes back."""
    (scene.run.root.parent / FILLER).unlink()


def cut_shard(scene: Scene) -> None:
    """Cuts the run's first training shard to half its length."""
    if scene.process is not None:
        _reach(scene)
    scene.strike()
    shard = _shard(scene)
    shutil.copy(shard, shard.with_suffix(".whole"))
    os.truncate(shard, shard.stat().st_size // 2)


def mend_shard(scene: Scene) -> None:
    """Puts the whole shard back."""
    _shard(scene).with_suffix(".whole").replace(_shard(scene))


def wait_for_explosion(scene: Scene) -> None:
    """Waits until the config's own learning rate has made `hit` fail."""
    scene.wait(lambda: scene.run.student("hit").error.exists(), "the loss's explosion")
    scene.strike()


def _write_until_full(file: IO[bytes], size: int) -> None:
    try:
        while True:
            file.write(bytes(size))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _shard(scene: Scene) -> Path:
    return sorted((scene.folder / "shards").glob("train-*.parquet"))[0]


def _reach(scene: Scene, later: int = 0) -> None:
    scene.reach("hit", FIRST_EPOCH + EPOCHS_LATER * scene.repetition + later)


def _processes(scene: Scene, who: str) -> list[psutil.Process]:
    if who == "student":
        return [psutil.Process(scene.pid_of("hit"))]
    if who == "teacher":
        return [psutil.Process(scene.pid_of_teacher())]
    assert scene.nodes is not None
    return scene.nodes.processes(who)
