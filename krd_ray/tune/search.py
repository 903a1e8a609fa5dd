"""Answers how a whole search goes: one cluster, one cache, one teacher, many trials, and what comes out.

Does not suggest (`searcher`), train (`trial`) or draw (`report` does).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna import Study
from optuna.storages import BaseStorage

from krd_ray.config import RunConfig
from krd_ray.config_io import parse_config
from krd_ray.errors import ConfigError, Interrupted, RunError
from krd_ray.report.search_page import build_search_report
from krd_ray.train.cluster import connected
from krd_ray.train.prepare import Prepared, prepare
from krd_ray.train.run import check_and_choose_cache, with_cached_blocks, write_origin
from krd_ray.train.rundir import read_json
from krd_ray.train.teaching import check_store_budget, teaching
from krd_ray.tune.check import Probe, as_it_stands, check_metrics, probe_space
from krd_ray.tune.confirm import confirm_best
from krd_ray.tune.laying import only_student
from krd_ray.tune.outcome import write_end, write_trials
from krd_ray.tune.progress import SearchProgress
from krd_ray.tune.room import trials_that_fit
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.searcher import StudySearch, scheduler_for
from krd_ray.tune.space import Space, load_space
from krd_ray.tune.study import (
    STUDY,
    ended_trials,
    open_storage,
    open_study,
    queue_first,
    requeue_interrupted,
    sampler_for,
    take_over,
)
from krd_ray.tune.trial import TrialKit
from krd_ray.tune.tuning import give_back, run_trials

Say = Callable[[str], None]


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
    """Checks a search and makes its folder: `run_dir` of the config, or runs/<name>-search-<time>.

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
    epochs = options.epochs or chosen.train_of(chosen.students[0]).epochs
    grace = options.grace_epochs
    grace = max(1, epochs // 4) if grace == 0 else grace
    study_name = options.study or (folder.root.name if options.storage else STUDY)
    options = replace(options, epochs=epochs, grace_epochs=grace, study=study_name)
    search = _checked(folder, options, chosen, space)
    earlier = SearchDir(Path(options.earlier).expanduser().resolve()) if options.earlier else None
    if earlier is not None:
        earlier.read()  # raises, before anything is made
    folder.create(options, space, search.config)
    write_origin(search.prepared, folder.run)
    study = open_study(open_storage(options.storage, folder.root), options.study, space)
    if study.get_trials(deepcopy=False):
        raise ConfigError(
            f"--storage {options.storage} holds a study {options.study} already; resume its search, or give --study "
            "another name"
        )
    queue_first(study, as_it_stands(space, search.config) if space.baseline else None)
    if earlier is not None:
        say(_begin_from(study, earlier, search))
    return search


def resumed_search(root: Path, trials: int | None) -> Search:
    """Opens a search that was interrupted or is to have more trials.

    Args:
        root: its directory.
        trials: how many in all; None: as many as it was started for.
    Raises:
        RunError: no search directory, or the shards have changed since.
    """
    folder = SearchDir(root.expanduser().resolve())
    options = folder.options()
    if trials is not None:
        options = replace(options, trials=trials)
        folder.add(options={**folder.read()["options"], "trials": trials})
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
        Interrupted: asked to stop; the search can be resumed.
    """
    folder = search.folder
    try:
        with connected(search.config.ray):
            record = _run_trials(search, say)
            seeds, best = search.options.confirm_seeds, record["best"]
            if seeds and best is not None and not best["baseline"]:
                confirm_best(search.config, folder, seeds=seeds, at_once=record["at_once"], say=say)
    except Interrupted as error:
        raise Interrupted(
            f"{error.message}; finished trials are kept, continue with `krd tune --resume {folder.root}`"
        ) from error
    finally:
        if folder.trials_csv.is_file():
            build_search_report(folder.root)
    return folder.read()


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


def _begin_from(study: Study, earlier: SearchDir, search: Search) -> str:
    """Feeds an earlier search into this one, and says what came of it."""
    record, options = earlier.read(), earlier.options()
    if record["metric"] != list(search.space.metrics):
        raise ConfigError(
            f"--from {earlier.root}: it searched for {', '.join(record['metric'])}, this space has METRIC "
            f"{', '.join(search.space.metrics)}"
        )
    before = open_study(open_storage(options.storage, earlier.root), options.study, earlier.space())
    same_data = read_json(earlier.run.dataset)["content_hash"] == search.prepared.manifest.content_hash
    same_epochs = options.epochs == search.options.epochs
    same = same_data and same_epochs and _bare(earlier.config()) == _bare(search.config)
    added, queued = take_over(study, before, search.space, str(earlier.root), values=same)
    why = "" if same else " (other images, epochs or config: its figures cannot be compared)"
    return f"from {earlier.root}: {added} finished trial(s) added{why}, {queued} best queued"


def _bare(config: RunConfig) -> dict[str, Any]:
    """What a trial's figures depend on, besides its own settings."""
    return config.model_dump(exclude={"name", "run_dir", "ray", "students_at_once", "evaluate"})


def _start_trials(search: Search, storage: BaseStorage, left: int, say: Say) -> None:
    """Cache, teacher, trials, on the connected cluster."""
    options, folder, student = search.options, search.folder, search.probe.typical
    cache = check_and_choose_cache(search.prepared.for_students([student]), [student])
    prepared = with_cached_blocks(search.prepared) if cache else search.prepared
    fitting = options.at_once or trials_that_fit(search.prepared, search.probe, streams=not cache)
    at_once = min(left, fitting)
    folder.add(at_once=fitting)
    taught = [student] * at_once if search.probe.needs_teacher else []
    say(f"{left} trial(s) of {options.epochs} epoch(s), {at_once} at once, in {folder.root}")
    with (
        SearchProgress(folder, options, search.space) as progress,
        teaching(prepared, folder.run, taught, progress.say) as link,
    ):
        if link is not None:
            check_store_budget(prepared, link.feature_dim, prepared.config.views.cycle or options.epochs)
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
