"""Answers how a whole run goes: cluster, data, teacher, students, ledger, in this order and back.

Does not train (`loop` does) and does not draw (`report` does). The driver that runs this holds references only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from krd_ray.atomic import write_text
from krd_ray.config import RunConfig, StudentConfig
from krd_ray.config_io import dump_config, load_config
from krd_ray.data.reading import cache_blocks
from krd_ray.errors import DiskFullError, Interrupted, RunError
from krd_ray.storage.places import split
from krd_ray.teacher.messages import RECEIVED_BYTES
from krd_ray.teacher.ports import TeacherLink
from krd_ray.teacher.spec import threads_for
from krd_ray.train.cluster import address_of, connected, fits_cache, living_nodes
from krd_ray.train.ledger import build_ledger
from krd_ray.train.live import Progress
from krd_ray.train.places import check_run, demands_of
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.processes import processes_of
from krd_ray.train.rundir import RunDir, environment, num_sessions, open_run, read_json, write_json
from krd_ray.train.students import StudentsRun, run_together
from krd_ray.train.teaching import teaching
from krd_ray.train.waiting import saying_who_waits
from krd_ray.train.worker_spec import WorkerSpec

TICK_S = 0.5
FILES_OF_ONES_OWN = ("parquet", "folder", "list")  # such data is known by the folder of its shards


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    run: RunDir
    config: RunConfig
    results: list[dict[str, Any]]
    num_trained: int

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [result for result in self.results if result["status"] != "finished"]


def start_run(config: RunConfig) -> Outcome:
    """Trains all students of a config in a new run directory.

    Raises:
        KrdError: anything that can be known to be wrong before training; nothing has been started then.
    """
    prepared = prepare(config)
    folder = config.run_dir or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with open_run(folder) as run:
        if run.config.exists():
            run.create()  # raises, and says how to go on
        resolved = prepared.config.model_copy(update={"run_dir": run.place})
        return _execute(replace(prepared, config=resolved), run, resolved.students)


def resume_run(place: str | Path) -> Outcome:
    """Continues every unfinished student of a run from its last checkpoint; finished ones are left alone.

    Args:
        place: path or URI of the run directory.
    """
    with open_run(place) as run:
        run.require()
        config = load_config(run.config)
        prepared = prepare(config)
        written = read_json(run.dataset)["content_hash"]
        if written != prepared.manifest.content_hash:
            raise RunError(
                f"{config.data.dir} holds other shards than {run.place} was started with; restore them"
            )
        open_students = [s for s in config.students if not _is_finished(run, s.name)]
        return _execute(prepared, run, open_students)


def _is_finished(run: RunDir, name: str) -> bool:
    path = run.student(name).result
    return path.is_file() and read_json(path)["status"] == "finished"


def _execute(prepared: Prepared, run: RunDir, students: Sequence[StudentConfig]) -> Outcome:
    try:
        return _train_and_account(prepared, run, students)
    except DiskFullError as error:
        if not run.config.exists():
            raise
        raise DiskFullError(
            f"{error.message}; then continue with `krd distill --resume {run.place}`"
        ) from error


def _train_and_account(prepared: Prepared, run: RunDir, students: Sequence[StudentConfig]) -> Outcome:
    config = prepared.config
    if students:
        with connected(config.ray):
            cache = check_and_choose_cache(prepared, students)
            _write_start(prepared, run)
            prepared = with_cached_blocks(prepared) if cache else prepared
            try:
                _train(prepared, run, students)
            except Interrupted as error:
                raise Interrupted(
                    f"{error.message}; the last checkpoint of every student is kept, continue with "
                    f"`krd distill --resume {run.place}`"
                ) from error
    run.sync()  # the rows that workers wrote last
    if students or not run.ledger.is_file():
        _write_ledger(prepared, run)
    results = [read_json(run.student(student.name).result) for student in config.students]
    return Outcome(run, config, results, len(students))


def check_and_choose_cache(prepared: Prepared, students: Sequence[StudentConfig]) -> bool:
    """Checks resources on the connected cluster; returns whether decoded shards fit into its object store."""
    config = prepared.config
    wanted = prepared.train.decoded_bytes + (prepared.val.decoded_bytes if prepared.val else 0)
    cache = fits_cache(config.data, wanted)
    check_run(config, students, living_nodes(), streams=not cache)
    return cache


def with_cached_blocks(prepared: Prepared) -> Prepared:
    """Puts the decoded shards into the object store."""
    val = cache_blocks(prepared.val) if prepared.val else None
    return replace(prepared, train=cache_blocks(prepared.train), val=val)


def _write_start(prepared: Prepared, run: RunDir) -> None:
    """Makes a new run's folder. Its config.yaml comes last, when the teacher is up: only then is it a run."""
    if run.config.exists():
        return
    run.create()
    write_origin(prepared, run)


def write_origin(prepared: Prepared, run: RunDir) -> None:
    """Writes down what a run depends on outside its config: environment.json and dataset.json."""
    write_json(run.root / "environment.json", environment())
    manifest = prepared.manifest
    kind = str(manifest.source["kind"])
    name = split(prepared.config.data.dir)[1] if kind in FILES_OF_ONES_OWN else kind
    known_as = {"name": name, "content_hash": manifest.content_hash}
    write_json(run.dataset, manifest.model_dump(mode="json") | known_as)


def _train(prepared: Prepared, run: RunDir, students: Sequence[StudentConfig]) -> None:
    config = prepared.config
    taught = [student for student in students if config.loss_of(student).needs_teacher]
    epochs = {student.name: config.train_of(student).epochs for student in students}
    with (
        Progress(run, epochs) as progress,
        _saying_who_waits(prepared, students, taught, progress.say),
        teaching(prepared, run, taught, progress.say) as link,
    ):
        if not run.config.exists():
            write_text(run.config, dump_config(config))
        processes = processes_of(config, students)
        runs = [students_run(prepared, run, process, link) for process in processes]
        shared = "" if len(runs) == len(students) else f" in {len(runs)} process(es)"
        progress.say(f"training {len(students)} student(s){shared}, run directory {run.place}")
        run_together(runs, progress.refresh, TICK_S, at_once=config.students_at_once)
        for result in [result for each in runs for result in each.finish()]:
            if result["error"]:
                progress.say(f"student {result['student']} failed: {result['error']}")


def _saying_who_waits(
    prepared: Prepared,
    students: Sequence[StudentConfig],
    taught: Sequence[StudentConfig],
    say: Callable[[str], None],
) -> AbstractContextManager[None]:
    """On a cluster of one's own nobody else takes places, and no node leaves: there is nothing to say."""
    config = prepared.config
    if address_of(config.ray) is None:
        return nullcontext()
    shares = bool(taught) and config.teacher is not None and config.teacher.placement == "actors"
    streams = prepared.train.blocks is None
    return saying_who_waits(demands_of(config, students, taught=shares, streams=streams), say)


def students_run(
    prepared: Prepared, run: RunDir, process: Sequence[StudentConfig], link: TeacherLink | None
) -> StudentsRun:
    """Returns the run of one process's students, not started.

    Args:
        prepared: the checked run, with cached blocks where there are any.
        run: where the students' folders lie.
        process: students that can share one (`processes_of`), with precision and memory layout decided
            (`prepare.resolve_student`).
        link: to the teacher; not used by students whose loss needs none.
    """
    first, config = process[0], prepared.config
    taught = config.loss_of(first).needs_teacher
    return StudentsRun(
        [_worker_spec(prepared, run, student, link if taught else None) for student in process],
        first.workers,
        first.resources,
        config.train_of(first).max_failures,
        strategy=first.strategy,
        sync=run.sync,
    )


def _worker_spec(
    prepared: Prepared, run: RunDir, student: StudentConfig, link: TeacherLink | None
) -> WorkerSpec:
    config = prepared.config
    train = config.train_of(student)
    return WorkerSpec(
        student=student.name,
        model=student.model,
        train=train,
        loss=config.loss_of(student),
        view=prepared.view,
        cycle=config.views.cycle,
        train_shards=prepared.train,
        val_shards=prepared.val,
        class_counts=prepared.class_counts,
        seed=config.seed_of(student),
        shuffle_seed=config.seed_of(student),
        window_rows=config.data.shuffle_rows,
        folder=str(run.student(student.name).root),
        session=num_sessions(run.student(student.name).rows()),
        dataset_hash=prepared.manifest.content_hash,
        num_threads=threads_for(student.resources.num_cpus, train.num_threads),
        teacher=link,
        place=run.place_of(run.student(student.name).root),
    )


def _write_ledger(prepared: Prepared, run: RunDir) -> None:
    config = prepared.config
    names = [student.name for student in config.students]
    taught = [student.name for student in config.students if config.loss_of(student).needs_teacher]
    ledger = build_ledger(run, names, taught=taught, driver_bytes=RECEIVED_BYTES, on_cpu=config.on_cpu)
    write_json(run.ledger, ledger)
