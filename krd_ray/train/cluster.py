"""Answers where a run computes: starts Ray on this machine or joins a cluster, and says what nodes it has.

Does not launch anything in it, and does not say whether a run fits (`places` does).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray

from krd_ray.config import DataConfig, RayConfig
from krd_ray.errors import Interrupted, ResourceError
from krd_ray.teacher.group import NAMESPACE
from krd_ray.train.places import Node

GRACE_S = 5.0  # for the processes of a cluster that has been shut down
# Set in the driver before Ray starts; a value the user has set wins.
EVERYWHERE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# glibc's malloc: a step's activations stay with the process instead of going back to the system and coming anew, page
# by page, at the next step (`benchmarks/freed_memory.py` says what that costs). Read when a process starts.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}
# For a cluster that lives and dies with the driver: its processes stand back behind those of whoever sits at the
# machine, but less than Ray's default, so that students can stand back further. Nothing preempts it, nobody scrapes
# its metrics or asks for its task events (both cost every process a thread's work), and several processes start at
# once on few cores without that being worth a warning.
ON_THIS_MACHINE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_worker_niceness": "5",
    **KEEP_FREED_MEMORY,
}
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job, with RAY_ADDRESS


def address_of(settings: RayConfig) -> str | None:
    """Returns the cluster to join: `ray.address`, else that of the Ray job whose driver this is; None: neither.

    Ray tells a submitted job where its cluster is. A second one, started there, would compete with it for the head.
    """
    return settings.address or (os.environ["RAY_ADDRESS"] if JOB_CONFIG in os.environ else None)


@contextmanager
def connected(settings: RayConfig) -> Iterator[None]:
    """Joins the cluster at `address_of`, or starts one here for the time of the block; keeps a joined one.

    The cluster started here has no dashboard. Ray's own ports listen on every interface, on Linux without a choice;
    its token authentication, on by default, keeps strangers out.
    """
    if ray.is_initialized():
        yield
        return
    address = address_of(settings)
    own = address is None
    for name, value in (EVERYWHERE | (ON_THIS_MACHINE if own else {})).items():
        os.environ.setdefault(name, value)
    for logger in ("ray", "ray.data", "ray.train"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    start: dict[str, Any] = {"address": address}
    if own:
        start = {
            "address": "local",
            "num_cpus": math.ceil(settings.num_cpus or os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": settings.object_store_bytes,
        }
    try:
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **start)
    except Exception as error:  # Ray raises bare exceptions here
        where = "start on this machine" if own else f"join the cluster at {address}"
        remedy = "if the machine is busy, try again later" if own else "check ray.address, and RAY_AUTH_TOKEN"
        raise ResourceError(f"Ray could not {where}: {str(error).splitlines()[0]}; {remedy}") from error
    try:
        with _interruptible():
            yield
    except Interrupted:
        # Threads that still wait for students would crash the process if Ray went away under them. The caller ends
        # the process, and what Ray started here dies with it.
        raise
    except BaseException:
        _leave()
        raise
    _leave()


def _leave() -> None:
    """Disconnects. A cluster of our own ends with every process of it; Ray's own shutdown may leave some behind.

    Joined clusters are no children of this process and stay.
    """
    started = _processes_of_raylets()
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _processes_of_raylets() -> list[psutil.Process]:
    """Raylets that this process has started, and what they have started."""
    children = psutil.Process().children(recursive=True)
    raylets = [child for child in children if _is_raylet(child)]
    return raylets + [process for raylet in raylets for process in _descendants(raylet)]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:  # it has ended since
        return []


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return Path(process.exe()).name == "raylet"
    except psutil.Error:  # it has ended since, or is not ours to look into
        return False


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Interrupted` for the time of the block; Ray has set handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fits_cache(settings: DataConfig, decoded_bytes: int) -> bool:
    """Returns whether decoded shards are to be kept in the object store of the connected cluster."""
    capacity = ray.cluster_resources().get("object_store_memory", 0.0)
    fits = decoded_bytes <= settings.cache_limit_frac * capacity
    return settings.cache == "memory" or (settings.cache == "auto" and fits)


def living_nodes() -> list[Node]:
    """Returns every living node of the connected cluster; nodes that share an address are told apart by their ids."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    return [
        Node(
            address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:8]})",
            node["Resources"],
            node["Labels"],
            node["NodeID"],
        )
        for node, address in zip(alive, addresses, strict=True)
    ]


def free_resources() -> dict[str, float]:
    """Returns what nobody has reserved in the connected cluster now, all nodes together."""
    return dict(ray.available_resources())
