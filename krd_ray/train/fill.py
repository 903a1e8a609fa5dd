"""Answers how a target store is filled before any student trains: all views of all images, on all replicas.

Does not train. A run with the same data, views and teacher then reads the store: with `teacher.placement: stored`
no teacher runs at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from krd_ray.config import RunConfig, TeacherConfig
from krd_ray.data.reading import cache_blocks
from krd_ray.errors import ConfigError, ResourceError
from krd_ray.storage.places import absolute
from krd_ray.train.cluster import connected, fits_cache, living_nodes
from krd_ray.train.places import check_resources, demands_of
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.teaching import check_store_budget, open_group, start_group, teacher_specs


@dataclass(frozen=True)
class Filled:
    """What filling a store came to.

    Args:
        store_dir: its folder.
        views: number of views.
        rows: (view, sample) pairs it holds now.
        forwards: of them computed this time.
        num_bytes: on disk.
        seconds: from the first forward to the last.
    """

    store_dir: str
    views: int
    rows: int
    forwards: int
    num_bytes: int
    seconds: float


def fill_targets(config: RunConfig, say: Callable[[str], None]) -> Filled:
    """Computes `views.cycle` views of every training image into the teacher's persistent store.

    Args:
        config: the run that will read it; its students are not trained.
        say: gets a line per view.
    Raises:
        ConfigError: the config has no teacher, no persistent store, or no bound on its views.
        ResourceError: the store's budget does not hold all views.
        KrdError: whatever else keeps the teacher from starting.
    """
    teacher = _checked(config)
    prepared = prepare(config)
    with connected(config.ray):
        streams = not fits_cache(prepared.config.data, prepared.train.decoded_bytes)
        check_resources(demands_of(prepared.config, [], taught=True, streams=streams), living_nodes())
        if not streams:
            prepared = replace(prepared, train=cache_blocks(prepared.train))
        return _fill(prepared, teacher, say)


def _checked(config: RunConfig) -> TeacherConfig:
    if config.teacher is None:
        raise ConfigError(
            "teacher is null; set teacher.weights to the teacher whose targets are to be stored"
        )
    wanted = {
        "views.cycle": (config.views.cycle, "the number of views to store"),
        "teacher.persist": (config.teacher.persist or None, "true"),
        "teacher.spill_dir": (config.teacher.spill_dir, "the store's folder"),
    }
    missing = [f"set {name} to {what}" for name, (value, what) in wanted.items() if value is None]
    if missing:
        raise ConfigError(
            f"a store that later runs read is persistent and holds some views: {'; '.join(missing)}"
        )
    return config.teacher


def _fill(prepared: Prepared, teacher: TeacherConfig, say: Callable[[str], None]) -> Filled:
    store = absolute(str(teacher.spill_dir))
    cycle = prepared.config.views.cycle
    assert cycle is not None
    group = open_group(prepared, teacher_specs(prepared, store, store), num_callers=1)
    try:
        info = start_group(group, prepared, say)
        check_store_budget(prepared, info.feature_dim, cycle)
        started, rows = time.perf_counter(), 0
        for view in range(cycle):
            rows += group.fill(prepared.train, [view])
            say(f"view {view + 1} of {cycle}: {rows:,} targets")
        seconds = time.perf_counter() - started
        _check_held(group.rows_held(range(cycle)), rows, teacher)
        stats = group.stats()
        group.publish()
    except BaseException:
        group.kill()
        raise
    group.close()
    forwards = sum(each["forwards"] for each in stats)
    return Filled(store, cycle, rows, forwards, sum(each["store_disk_bytes"] for each in stats), seconds)


def _check_held(held: int, filled: int, teacher: TeacherConfig) -> None:
    """Refuses a store that has dropped views while others were computed; it held more than these before."""
    if held < filled:
        raise ResourceError(
            f"the store in {teacher.spill_dir} has dropped {filled - held:,} of {filled:,} targets: views of earlier "
            "runs fill it; raise teacher.disk_bytes, or give these targets a teacher.spill_dir of their own"
        )
