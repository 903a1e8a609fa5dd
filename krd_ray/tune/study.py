"""Answers what a search remembers: the Optuna study, opened, continued after a kill, fed from an earlier search.

Does not suggest or train. The study is the one truth about a search; nothing of it is ever unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from krd_ray.errors import ConfigError
from krd_ray.tune.check import could_draw
from krd_ray.tune.space import Settings, Space

JOURNAL = "study.log"
SQLITE = "sqlite:///"
STUDY = "search"
STARTUP_TRIALS = 10  # drawn at random before TPE begins, Optuna's own default
OUTCOMES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

# What a trial's user attributes are called in the study.
BASELINE = "baseline"  # True for the config as it stands
SETTINGS = "settings"  # all dotted names laid over the config
ERROR = "error"  # why a trial failed
INTERRUPTED = "interrupted"  # True for a trial that died with its driver; its settings were queued again
SOURCE = "source"  # folder of the earlier search that a trial was taken from
FIGURES = "figures"  # the last validation row
EPOCHS = "epochs"
SECONDS = "seconds"


def open_storage(url: str | None, root: Path) -> BaseStorage:
    """Opens where the study is kept.

    Args:
        url: None for a journal file in the search's folder; else `sqlite:///file`, `postgresql://...` or `mysql://...`.
        root: the search's folder.
    Raises:
        ConfigError: Optuna cannot open it.
    """
    if url is None:
        return JournalStorage(JournalFileBackend(str(root / JOURNAL)))
    try:
        return RDBStorage(url)
    except Exception as error:  # SQLAlchemy and database drivers raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--storage {url}: {reason}; expected sqlite:///FILE, postgresql://... or mysql://..., with its driver "
            "installed"
        ) from error


def refuse_known(url: str | None, root: Path, name: str, space: Space) -> None:
    """Refuses a new study that is there already; nothing is made where there is none.

    Args:
        url, root: as for `open_storage`; the folder need not exist.
        name: of the study.
        space: of the search, with its objectives.
    Raises:
        ConfigError: it holds trials or has other objectives, or the storage cannot be opened.
    """
    file = _file_of(url, root)
    if file is not None and not file.is_file():
        if url is not None and not file.parent.is_dir() and file.parent.resolve() != root:
            raise ConfigError(f"--storage {url}: the folder {file.parent} does not exist; make it")
        return
    storage = open_storage(url, root)
    if not has_study(storage, name) or not open_study(storage, name, space).get_trials(deepcopy=False):
        return
    if url is None:
        raise ConfigError(
            f"{file} is what a search left that ended while it was being made; remove {root}, or choose another "
            "run_dir"
        )
    raise ConfigError(
        f"--storage {url} holds a study {name} already; resume its search, or give --study another name"
    )


def has_study(storage: BaseStorage, name: str) -> bool:
    """Returns whether a storage holds a study of that name."""
    return name in optuna.study.get_all_study_names(storage)


def _file_of(url: str | None, root: Path) -> Path | None:
    """The file that a storage is, None for a server."""
    if url is None:
        return root / JOURNAL
    return Path(url.removeprefix(SQLITE).partition("?")[0]) if url.startswith(SQLITE) else None


def open_study(storage: BaseStorage, name: str, space: Space) -> optuna.Study:
    """Opens the study, made if it is not there.

    Raises:
        ConfigError: there is a study of that name with other objectives.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = [
        StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in space.modes
    ]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True, sampler=_random()
    )
    if study.directions != directions:
        found, wanted = (
            ", ".join(direction.name.lower() for direction in each) for each in (study.directions, directions)
        )
        raise ConfigError(
            f"the study {name} is to {found}, this space wants to {wanted}; give --study another name"
        )
    return study


def _random() -> optuna.samplers.BaseSampler:
    """A sampler for studies that are only read and written here."""
    return optuna.samplers.RandomSampler(seed=0)


def sampler_for(study: optuna.Study, seed: int) -> optuna.samplers.BaseSampler:
    """Returns the sampler that suggests: TPE over all parameters together, with those under conditions in groups.

    Its seed is derived from `seed` and the number of trials that the study holds, so that a resumed search does not
    draw its first points again.
    """
    derived = int(np.random.SeedSequence([seed, len(study.trials)]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
        return optuna.samplers.TPESampler(
            seed=derived, multivariate=True, group=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS
        )


def own_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials of this search, without those added from an earlier one."""
    return [trial for trial in study.get_trials(deepcopy=False) if SOURCE not in trial.user_attrs]


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Own trials that count: complete, pruned or failed by themselves, not by the death of their driver."""
    return [
        trial
        for trial in own_trials(study)
        if trial.state in OUTCOMES and not trial.user_attrs.get(INTERRUPTED)
    ]


def requeue_interrupted(study: optuna.Study) -> list[int]:
    """Marks trials that a dead driver left running as failed, and queues their settings again.

    Returns:
        Their numbers.
    """
    numbers = []
    for trial in own_trials(study):
        if trial.state != TrialState.RUNNING:
            continue
        attributes = {key: trial.user_attrs[key] for key in (BASELINE,) if key in trial.user_attrs}
        study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
        study._storage.set_trial_user_attr(trial._trial_id, ERROR, "the search was interrupted; queued again")
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs=attributes)
        numbers.append(trial.number)
    return numbers


def queue_first(study: optuna.Study, baseline: Settings | None, points: Sequence[Settings] = ()) -> None:
    """Queues what is tried before anything is drawn: the config as it stands, then known points.

    Args:
        study: of a new search.
        baseline: the space's parameters in the config as it stands; None without a baseline.
        points: parameters of earlier searches.
    """
    if baseline is not None:
        study.enqueue_trial(baseline, user_attrs={BASELINE: True})
    for point in points:
        study.enqueue_trial(point)


class Replay:
    """Answers `suggest_*` with given parameters, and finds out whether a space could have drawn them.

    Args:
        given: parameters of a trial of another search.
    """

    def __init__(self, given: Settings) -> None:
        self._given, self.number = given, 0
        self.params: Settings = {}
        self.distributions: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> Any:
        return self._answer(name, optuna.distributions.FloatDistribution(low, high, **how))

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> Any:
        return self._answer(name, optuna.distributions.IntDistribution(low, high, **how))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._answer(name, optuna.distributions.CategoricalDistribution(choices))

    def _answer(self, name: str, distribution: optuna.distributions.BaseDistribution) -> Any:
        if name not in self._given or not could_draw(distribution, self._given[name]):
            raise _NotDrawable(name)
        self.params[name], self.distributions[name] = self._given[name], distribution
        return self._given[name]


class _NotDrawable(ConfigError):
    """The space could not have drawn these parameters."""


def replay(space: Space, given: Settings) -> Replay | None:
    """Returns the parameters of a trial as this space would have drawn them, None where it could not have.

    Parameters that the space does not ask for make a trial another trial: it is not taken over either.
    """
    found = Replay(given)
    try:
        space.settings(found)
    except _NotDrawable:
        return None
    return found if found.params.keys() == given.keys() else None


def take_over(
    study: optuna.Study, earlier: optuna.Study, space: Space, source: str, *, values: bool
) -> tuple[int, int]:
    """Adds the finished trials of an earlier search that this space could have drawn, and queues its best.

    Args:
        study: of the new search.
        earlier: of the earlier one, with the same objectives.
        space: of the new search.
        source: the earlier folder, kept with each trial.
        values: what they reached can be compared with this search's trials; else only the best is queued, without.
    Returns:
        Numbers of trials added and queued.
    """
    finished = [trial for trial in ended_trials(earlier) if trial.state == TrialState.COMPLETE]
    added = 0
    for trial in finished if values else []:
        found = replay(space, trial.params)
        if found is None or trial.user_attrs.get(BASELINE):
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                values=trial.values,
                params=found.params,
                distributions=found.distributions,
                intermediate_values=trial.intermediate_values,
                user_attrs={SOURCE: source} | {key: trial.user_attrs[key] for key in (FIGURES, EPOCHS)},
            )
        )
        added += 1
    best = [
        replay(space, trial.params) for trial in best_trials(earlier) if not trial.user_attrs.get(BASELINE)
    ]
    points = [found.params for found in best if found is not None]
    for point in points:
        study.enqueue_trial(point)
    return added, len(points)


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Own complete trials that no other one beats: the best, or the Pareto front of two objectives, in its order."""
    complete = [trial for trial in ended_trials(study) if trial.state == TrialState.COMPLETE]
    gains = {trial.number: gains_of(study, trial) for trial in complete}
    front = [
        trial
        for trial in complete
        if not any(_beats(gains[other.number], gains[trial.number]) for other in complete)
    ]
    front.sort(key=lambda trial: (gains[trial.number], -trial.number), reverse=True)
    return front if len(study.directions) > 1 else front[:1]


def gains_of(study: optuna.Study, trial: FrozenTrial) -> tuple[float, ...]:
    """A trial's values, each with the sign that makes larger better."""
    signs = [1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions]
    return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))


def _beats(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))


def compromise(study: optuna.Study, front: Sequence[FrozenTrial]) -> FrozenTrial:
    """Chooses one trial of a front: the one nearest to the best of every objective, each scaled to the front's range.

    Of a single objective there is nothing to choose.
    """
    gains = {trial.number: np.array(gains_of(study, trial)) for trial in front}
    best, worst = np.max(list(gains.values()), axis=0), np.min(list(gains.values()), axis=0)
    scale = np.where(best > worst, best - worst, 1.0)
    return min(front, key=lambda trial: float(np.linalg.norm((best - gains[trial.number]) / scale)))
