"""Answers how a whole search goes: one cluster, one cache, one teacher, many trials, and what comes out.

Does not suggest (`searcher`), train (`trial`) or draw (`report` does).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage

from krd_ray.config import RunConfig
from krd_ray.config_io import parse_config
from krd_ray.errors import ConfigError, Interrupted, RunError
from krd_ray.report.search_page import build_search_report
from krd_ray.train.cluster import connected
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.run import check_and_choose_cache, with_cached_blocks, write_origin
from krd_ray.train.rundir import read_json
from krd_ray.train.teaching import teaching
from krd_ray.tune.check import Probe, as_it_stands, check_metrics, check_store, probe_space
from krd_ray.tune.confirm import confirm_best
from krd_ray.tune.earlier import begin_from, open_earlier
from krd_ray.tune.laying import only_student
from krd_ray.tune.outcome import write_end, write_trials
from krd_ray.tune.progress import SearchProgress
from krd_ray.tune.room import check_at_once, places_for_trials, trials_that_fit
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.searcher import StudySearch, scheduler_for
from krd_ray.tune.space import Space, load_space
from krd_ray.tune.study import (
    STUDY,
    ended_trials,
    open_storage,
    open_study,
    queue_first,
    refuse_known,
    requeue_interrupted,
    sampler_for,
)
from krd_ray.tune.trial import TrialKit
from krd_ray.tune.tuning import give_back, run_trials

Say = Callable[[str], None]
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """A search that can start: everything about it that needs no cluster has been checked.

    Args:
        folder: its directory.
        options: what was asked for.
        config: of one student, as it stands.
        space: what is drawn.
        probe: what drawing from it has shown.
        prepared: data, views and models, checked for every kind of trial that was drawn.
    """

    folder: SearchDir
    options: SearchOptions
    config: RunConfig
    space: Space
    probe: Probe
    prepared: Prepared


def new_search(
    config: RunConfig, space_file: Path, options: SearchOptions, *, student: str | None, say: Say
) -> Search:
    """Checks a search, then makes its folder: `run_dir` of the config, or runs/<name>-search-<time>.

    Args:
        config: with the student that is tuned.
        space_file: Python or YAML.
        options: how many trials, how long; `epochs` 0 stands for the config's, `grace_epochs` 0 for a quarter of
            them, an empty `study` for `search`, or for the folder's name in a storage that others may share.
        student: which of several.
        say: gets what an earlier search has brought in.
    Raises:
        KrdError: anything that can be known to be wrong before a cluster is asked for anything.
    """
    chosen = only_student(config, student)
    space = load_space(space_file)
    default = f"runs/{config.name}-search-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = SearchDir(Path(config.run_dir or default).expanduser().resolve())
    folder.refuse_taken()
    epochs = options.epochs or chosen.train_of(chosen.students[0]).epochs
    grace = options.grace_epochs
    grace = max(1, epochs // 4) if grace == 0 else grace
    study_name = options.study or (folder.root.name if options.storage else STUDY)
    options = replace(options, epochs=epochs, grace_epochs=grace, study=study_name)
    search = _checked(folder, options, chosen, space)
    earlier = None
    if options.earlier:
        content = search.prepared.manifest.content_hash
        earlier = open_earlier(
            Path(options.earlier), space, search.config, epochs=epochs, content_hash=content
        )
    refuse_known(options.storage, folder.root, options.study, space)
    # Everything has been checked; search.json, which makes the folder a search, comes last.
    folder.run.make_folders()
    study = open_study(open_storage(options.storage, folder.root), options.study, space)
    write_origin(search.prepared, folder.run)
    queue_first(study, as_it_stands(space, search.config) if space.baseline else None)
    if earlier is not None:
        say(begin_from(study, earlier, space))
    folder.create(options, space, search.config)
    return search


def resumed_search(
    root: Path,
    *,
    trials: int | None = None,
    at_once: int | None = None,
    confirm_seeds: tuple[int, ...] | None = None,
) -> Search:
    """Opens a search that was interrupted or is to have more trials; writes nothing.

    Args:
        root: its directory.
        trials: how many in all; None: as many as it was last asked for. So for the others:
        at_once: trials at the same time.
        confirm_seeds: of the comparison at the end; empty: none.
    Raises:
        RunError: no search directory, or the shards have changed since.
    """
    folder = SearchDir(root.expanduser().resolve())
    options = folder.options()
    changes: dict[str, Any] = {"trials": trials, "at_once": at_once, "confirm_seeds": confirm_seeds}
    options = replace(options, **{name: value for name, value in changes.items() if value is not None})
    search = _checked(folder, options, folder.config(), folder.space())
    if read_json(folder.run.dataset)["content_hash"] != search.prepared.manifest.content_hash:
        raise RunError(
            f"{search.config.data.dir} holds other shards than {folder.root} was started with; restore them"
        )
    return search


def run_search(search: Search, say: Say) -> dict[str, Any]:
    """Runs the trials that are left, and writes what comes out.

    Args:
        search: checked.
        say: gets lines for people.
    Returns:
        The content of search.json.
    Raises:
        RunError: another driver works on it.
        Interrupted: asked to stop; the search can be resumed.
    """
    folder = search.folder
    with folder.hold():
        folder.add(options=asdict(search.options))
        try:
            with connected(search.config.ray):
                record = _run_trials(search, say)
                seeds, best = search.options.confirm_seeds, record["best"]
                if seeds and best is not None and not best["baseline"]:
                    places = _places(search, record["at_once"])
                    confirm_best(search.config, folder, seeds=seeds, at_once=places, say=say)
        except Interrupted as error:
            raise Interrupted(
                f"{error.message}; finished trials are kept, continue with `krd tune --resume {folder.root}`"
            ) from error
        except Exception:
            _report_so_far(folder)
            raise
        if folder.trials_csv.is_file():
            build_search_report(folder.root)
        return folder.read()


def _report_so_far(folder: SearchDir) -> None:
    """Writes the report of a search that has failed; why it failed is told whatever becomes of the report."""
    try:
        if folder.trials_csv.is_file():
            build_search_report(folder.root)
    except Exception as error:  # noqa: BLE001 - the search's own error is on its way up
        LOG.warning("%s: the report of the failed search could not be written: %s", folder.root, error)


def _places(search: Search, last: int) -> int:
    """Students of the confirmation at once: as many as trials, or fewer where the cluster has become smaller."""
    cache = _choose_cache(search)
    places = places_for_trials(search.prepared, search.probe, streams=not cache)
    return max(min(search.options.at_once or last, places), 1)


def _choose_cache(search: Search) -> bool:
    """Whether decoded shards stay in the object store; raises where not even one trial fits the cluster."""
    student = search.probe.typical
    return check_and_choose_cache(search.prepared.for_students([student]), [student])


def _run_trials(search: Search, say: Say) -> dict[str, Any]:
    """Runs the trials that are left, and writes what comes out of all of them."""
    options, folder = search.options, search.folder
    storage = open_storage(options.storage, folder.root)
    study = open_study(storage, options.study, search.space)
    again = requeue_interrupted(study)
    if again:
        say(f"{len(again)} trial(s) died with their driver and run again: {', '.join(map(str, again))}")
    left = options.trials - len(ended_trials(study))
    started = time.time()
    if left > 0:
        _start_trials(search, storage, left, say)
    seconds = time.time() - started if left > 0 else 0.0
    return write_end(folder, search.config, search.space, search.prepared, study, seconds=seconds)


def _checked(folder: SearchDir, options: SearchOptions, config: RunConfig, space: Space) -> Search:
    searched = _for_trials(config, options)
    probe = probe_space(space, searched, seed=options.seed)
    prepared = prepare(searched.model_copy(update={"students": list(probe.students)}))
    check_metrics(space, prepared)
    confirm_epochs = config.train_of(config.students[0]).epochs if options.confirm_seeds else 0
    check_store(prepared, probe, epochs=options.epochs, confirm_epochs=confirm_epochs)
    return Search(folder, options, _resolved(config, prepared), space, probe, prepared)


def _resolved(config: RunConfig, prepared: Prepared) -> RunConfig:
    """The config with what depends on data and folder written out, but for the student, which trials change."""
    update: dict[str, Any] = {"data": prepared.config.data, "views": prepared.config.views}
    if config.teacher is not None and prepared.config.teacher is not None:
        update["teacher"] = prepared.config.teacher.model_copy(update={"persist": config.teacher.persist})
    return config.model_copy(update=update)


def _for_trials(config: RunConfig, options: SearchOptions) -> RunConfig:
    """The config that trials are laid over: its epochs, validation rows where ASHA needs them, a store that stays."""
    raw = config.model_dump(mode="json")
    (student,) = raw["students"]
    own = student["train"]
    own["epochs"] = options.epochs
    if options.grace_epochs is not None:
        own["val_every_epochs"] = 1
    if config.teacher is not None:
        if config.teacher.placement == "in_process":
            raise ConfigError(
                "teacher.placement in_process gives every trial a teacher of its own; a search shares one: set it to "
                "actors"
            )
        raw["teacher"]["persist"] = True
    return parse_config({**raw, "students_at_once": None})


def _start_trials(search: Search, storage: BaseStorage, left: int, say: Say) -> None:
    """Cache, teacher, trials, on the connected cluster."""
    options, folder, student = search.options, search.folder, search.probe.typical
    cache = _choose_cache(search)
    fitting = options.at_once or trials_that_fit(search.prepared, search.probe, streams=not cache)
    at_once = min(left, fitting)
    if options.at_once is not None:
        check_at_once(search.prepared, search.probe, at_once, streams=not cache)
    prepared = with_cached_blocks(search.prepared) if cache else search.prepared
    folder.add(at_once=fitting)
    taught = [student] * at_once if search.probe.needs_teacher else []
    say(f"{left} trial(s) of {options.epochs} epoch(s), {at_once} at once, in {folder.root}")
    with (
        SearchProgress(folder, options, search.space) as progress,
        teaching(prepared, folder.run, taught, progress.say) as link,
    ):
        if link is not None:
            folder.add(teacher_actors=list(link.names))
        shared = link.detached() if link is not None else None
        kit = TrialKit(_for_trials(search.config, options), prepared, folder.run, shared)
        search_alg = _search_alg(search, kit, storage, progress)
        scheduler = scheduler_for(
            search.space,
            epochs=options.epochs,
            grace=options.grace_epochs,
            run=folder.run,
            number_of=search_alg.number_of,
        )
        run_trials(kit, search_alg, scheduler, num=left, at_once=at_once, tick=progress.refresh)


def _search_alg(search: Search, kit: TrialKit, storage: BaseStorage, progress: SearchProgress) -> StudySearch:
    options = search.options
    study = open_study(storage, options.study, search.space)

    def ended(number: int, lost: bool) -> None:
        if lost:
            give_back(search.folder.run.student(str(number)))
        progress.ended(study, number)
        write_trials(search.folder, study)

    sampler = sampler_for(study, options.seed)
    return StudySearch(search.space, kit.config, storage, options.study, sampler, ended)
