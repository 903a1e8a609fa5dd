"""Answers how one repetition of one fault goes: start, strike, end, and where it is promised, mend and go on.

Does not judge (`verdict` does).
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults.nodes import cluster_of
from benchmarks.faults.registry import FAULTS, Fault
from benchmarks.faults.running import Scene, short_ray_folder
from benchmarks.faults.setting import MARK, Files, write_config
from benchmarks.faults.verdict import judge
from krd_ray.config import merge
from krd_ray.errors import KrdError
from krd_ray.train.rundir import RunDir


def unfaulted_run(files: Files, setting: str, folder: Path) -> RunDir:
    """Returns a run that nothing happens to."""
    shutil.rmtree(folder, ignore_errors=True)
    with _scene(files, folder, setting, {}) as scene:
        scene.start("distill", scene.config)
        scene.finish()
        if scene.exit_codes != [0]:
            raise KrdError(f"the unfaulted run ended with {scene.exit_codes[0]}: {scene.outputs[0]}")
        return scene.run


def try_fault(
    name: str, repetition: int, files: Files, folder: Path, unfaulted: list[RunDir]
) -> dict[str, Any]:
    """One repetition of a fault; what went wrong on the way stands under `error`, and the promise is broken then.

    Args:
        name: of the fault.
        repetition: decides the epoch, and with the name the moment in it.
        files: shards and teacher.
        folder: for everything of this repetition; emptied before.
        unfaulted: two runs of the same setting.
    """
    fault = FAULTS[name]
    shutil.rmtree(folder, ignore_errors=True)
    started, found = time.time(), {"fault": name, "repetition": repetition, "kept": False}
    with disk_of(fault.disk_bytes, folder / "disk"):
        changes = dict(fault.changes)
        if fault.own_shards:
            shutil.copytree(files.shards, folder / "shards")
            changes = merge(changes, {"data": {"dir": str(folder / "shards")}})
        with _scene(files, folder, fault.setting, changes, fault) as scene:
            scene.draws, scene.repetition = random.Random(f"{name} {repetition}"), repetition
            try:
                _play(fault, scene)
                found |= judge(fault, scene, unfaulted)
            except (KrdError, OSError, subprocess.SubprocessError) as error:
                found["error"] = f"{type(error).__name__}: {error}"
                if len(scene.exit_codes) < len(scene.outputs):
                    scene.kill_all()
                    scene.finish()
    return found | {"seconds": time.time() - started}


def _play(fault: Fault, scene: Scene) -> None:
    if fault.before:
        fault.strike(scene)
    scene.start("distill", scene.config)
    if not fault.before:
        fault.strike(scene)
    scene.finish()
    scene.ended_at = time.time()
    if fault.again:
        if fault.mend is not None:
            fault.mend(scene)
        scene.restored_at = time.time()
        scene.start("distill", *(["--resume", scene.run.root] if fault.again == "resume" else [scene.config]))
        scene.finish()
    scene.notes["left_over"] = scene.left_over()


@contextmanager
def disk_of(num_bytes: int | None, folder: Path) -> Iterator[None]:
    """A file system of that size at the folder for the time of the block; None: an ordinary folder.

    Raises:
        KrdError: this user may not mount.
    """
    folder.mkdir(parents=True)
    if num_bytes is None:
        yield
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "krd-faults", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KrdError(f"a full disk needs one of its own, and root to mount it: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _scene(
    files: Files, folder: Path, setting: str, changes: dict[str, Any], fault: Fault | None = None
) -> Iterator[Scene]:
    run = folder / "disk/run"
    scene = Scene(RunDir(run), folder / "config.yaml", folder, uuid.uuid4().hex, random.Random(0), 0)
    shapes, quick = (fault.nodes, fault.quick) if fault else (None, True)
    os.environ[MARK] = scene.mark
    try:
        with short_ray_folder(), cluster_of(shapes, quick=quick) as scene.nodes:
            if scene.nodes is not None:
                changes = merge(
                    changes, {"ray": {"address": scene.nodes.address, "object_store_bytes": None}}
                )
            write_config(scene.config, files.config(setting, run, changes))
            yield scene
    finally:
        scene.kill_all()
        del os.environ[MARK]
