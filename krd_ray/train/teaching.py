"""Answers how a run comes by its teacher: shared actors, one inside each student, or a store that was filled before.

Does not train students (`students` does) and holds no targets.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from krd_ray.config import StudentConfig, TeacherConfig
from krd_ray.data.shard_set import sample_ids_of
from krd_ray.errors import ResourceError, TeacherError
from krd_ray.maths.priors import PriorKind
from krd_ray.storage.places import absolute, join, split
from krd_ray.teacher.calibrate import load_calibration
from krd_ray.teacher.group import TeacherGroup, check_accuracy
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.ports import TeacherLink
from krd_ray.teacher.replica import TeacherInfo
from krd_ray.teacher.spec import TeacherSpec, load_teacher, threads_for
from krd_ray.teacher.store import PAGE_BYTES, fits_store
from krd_ray.teacher.stored import StoreReader
from krd_ray.teacher.window import LARGEST
from krd_ray.train.objective import rectifier_for
from krd_ray.train.prepare import Prepared
from krd_ray.train.processes import processes_of
from krd_ray.train.rundir import RunDir

PROBE_IMAGES = 16


@contextmanager
def teaching(
    prepared: Prepared, run: RunDir, taught: Sequence[StudentConfig], say: Callable[[str], None]
) -> Iterator[TeacherLink | None]:
    """The teacher for the time of the block, calibrated and tested; None when nobody learns from one."""
    config = prepared.config.teacher
    if config is None or not taught:
        yield None
        return
    specs = teacher_specs(prepared, run.place, run.place_of(run.teacher))
    if config.placement == "stored":
        yield _stored(specs[0], config, prepared, say)
        return
    group = open_group(prepared, specs, num_callers=_num_callers(prepared, taught))
    try:
        info = start_group(group, prepared, say)
        link = TeacherLink(
            config.placement,
            info.teacher_hash,
            info.feature_dim,
            config.timeout_s,
            replicas=tuple(group.replicas) if config.placement == "actors" else (),
            spec=None if config.placement == "actors" else specs[0],
            has_pixels=specs[0].shards.blocks is not None,
            names=group.names if config.placement == "actors" else (),
        )
        if config.placement == "in_process":  # it has calibrated and tested; each student brings up its own
            group.close()
        yield link
    except BaseException:
        group.kill()
        raise
    if config.placement == "actors":
        group.publish()
        group.close()


def open_group(prepared: Prepared, specs: Sequence[TeacherSpec], *, num_callers: int) -> TeacherGroup:
    """Returns the actors, starting."""
    config = prepared.config.teacher
    assert config is not None
    name = f"teacher-{prepared.config.name}-{uuid.uuid4().hex[:8]}"
    return TeacherGroup(specs, config.resources, num_callers=num_callers, name=name, strategy=config.strategy)


def start_group(group: TeacherGroup, prepared: Prepared, say: Callable[[str], None]) -> TeacherInfo:
    """Calibrates and tests the teacher, and says how it did."""
    config = prepared.config.teacher
    assert config is not None
    side = prepared.train.side
    probe = np.random.default_rng(0).integers(0, 256, (PROBE_IMAGES, side, side, 3), np.uint8)
    info = group.start(prepared.train, probe, min_accuracy=_min_accuracy(config, prepared))
    say(
        f"teacher {info.model}: {info.accuracy:.1%} of its training images right (mean over classes), "
        f"{config.replicas} replica(s) on {info.device}"
    )
    return info


def teacher_specs(prepared: Prepared, root: str, folder: str) -> list[TeacherSpec]:
    """Returns one spec per replica.

    Args:
        prepared: the run's data and resolved config.
        root: path or URI of the run; names a store that no other run shares.
        folder: for statistics, self-test and calibration; path or URI.
    """
    config = prepared.config.teacher
    assert config is not None
    assert config.compile != "auto"
    store = _store_dir(config, root, folder)
    return [
        TeacherSpec(
            weights=config.weights,
            model=config.model,
            view=prepared.view,
            shards=prepared.train,
            dataset_hash=prepared.manifest.content_hash,
            class_counts=prepared.class_counts,
            replica=replica,
            num_replicas=config.replicas,
            micro_batch=config.micro_batch,
            queue_rows=config.queue_rows,
            memory_bytes=config.memory_bytes,
            disk_bytes=config.disk_bytes,
            persist=config.persist,
            precision=config.precision,
            compile=config.compile,
            num_threads=threads_for(config.resources.num_cpus, config.num_threads),
            device="cuda" if config.resources.num_gpus > 0 else "cpu",
            store_dir=store,
            run_dir=folder,
            calibration=_calibration(config, prepared, store if config.persist else folder),
            priors=_priors(prepared),
        )
        for replica in range(config.replicas)
    ]


def check_store_budget(prepared: Prepared, feature_dim: int, num_views: int) -> None:
    """Refuses a budget under which a persistent store would drop its oldest views.

    Args:
        prepared: with a teacher.
        feature_dim: D_t.
        num_views: views per image that the store is to hold.
    Raises:
        ResourceError: they do not fit `teacher.disk_bytes`.
    """
    teacher = prepared.config.teacher
    assert teacher is not None
    width = prepared.manifest.num_classes + feature_dim
    homes = home_of(sample_ids_of(prepared.train), teacher.replicas)
    rows = int(np.bincount(homes).max()) * num_views
    if not fits_store(rows, width, teacher.disk_bytes):
        needed = rows * width * 2 + PAGE_BYTES
        raise ResourceError(
            f"{rows:,} targets of {width} values, the share of one replica, need {needed:,} bytes in whole pages; "
            f"teacher.disk_bytes is {teacher.disk_bytes:,}: raise it, or lower views.cycle"
        )


def _stored(
    spec: TeacherSpec, config: TeacherConfig, prepared: Prepared, say: Callable[[str], None]
) -> TeacherLink:
    """The link to a filled store; the teacher's weights are read to know its name, and nothing is forwarded."""
    loaded = load_teacher(spec)
    found = load_calibration(spec.calibration, loaded.teacher_hash)
    if found is None:
        raise TeacherError(
            f"{spec.store_dir} holds no targets of this teacher for these images; fill it with `krd targets CONFIG`, "
            "with the same teacher settings"
        )
    check_accuracy(found[1], _min_accuracy(config, prepared))
    ids, width = sample_ids_of(spec.shards), len(spec.class_counts) + loaded.feature_dim
    for replica in range(config.replicas):
        stored = StoreReader(spec, loaded.teacher_hash, replica, ids, width)
        stored.require(range(prepared.config.views.cycle or 0))
    say(f"teacher {loaded.model}: off; its targets come from {spec.store_dir}")
    return TeacherLink("stored", loaded.teacher_hash, loaded.feature_dim, config.timeout_s, spec=spec)


def _num_callers(prepared: Prepared, taught: Sequence[StudentConfig]) -> int:
    """Requests that may be out at the same time: a process asks once for each form of targets."""
    config = prepared.config
    waiting = []
    for process in processes_of(config, taught):
        forms = len({rectifier_for(config.loss_of(student)) for student in process})
        each = config.train_of(process[0]).in_flight or LARGEST
        waiting.append(process[0].workers * each * forms)
    return sum(sorted(waiting, reverse=True)[: config.students_at_once])


def _min_accuracy(config: TeacherConfig, prepared: Prepared) -> float:
    return 2 / prepared.manifest.num_classes if config.min_accuracy is None else config.min_accuracy


def _priors(prepared: Prepared) -> tuple[PriorKind, ...]:
    """Kinds of balanced priors that some student asks for."""
    losses = [prepared.config.loss_of(student) for student in prepared.config.students]
    return tuple(sorted({loss.rrd.prior for loss in losses if loss.rrd.weight > 0}))


def _calibration(config: TeacherConfig, prepared: Prepared, folder: str) -> str:
    """Where the calibration is kept: with the store where that outlives the run, so that it is not made again."""
    if not config.persist:
        return join(folder, "calibration.safetensors")
    device = "cuda" if config.resources.num_gpus > 0 else "cpu"
    teacher = (
        f"{config.weights} {config.model} {config.precision} {config.compile} {config.micro_batch} {device}"
    )
    name = f"{teacher} {prepared.view.key()} {prepared.manifest.content_hash}"
    return join(folder, f"calibration-{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors")


def _store_dir(config: TeacherConfig, root: str, folder: str) -> str:
    """A folder that runs share only if the store is to outlive them."""
    if config.spill_dir is None:
        return join(folder, "store")
    shared = absolute(config.spill_dir)
    own = f"{split(root)[1]}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
    return shared if config.persist else join(shared, own)
