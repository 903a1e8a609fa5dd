"""Answers which trial comes next and which is stopped: Optuna suggests, ASHA compares, the study is told the truth.

Does not start trials (Ray Tune does) and does not train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from krd_ray.config import RunConfig
from krd_ray.errors import ConfigError
from krd_ray.train.rundir import RunDir
from krd_ray.tune import study as names
from krd_ray.tune.check import Present
from krd_ray.tune.space import Space
from krd_ray.tune.trial import EPOCH, LAID, NUMBER, STATUS, TRIAL_ERROR

REDUCTION = 3  # of the trials that reach a rung, about one in three goes on
Told = Callable[[int, bool], None]


class StudySearch(OptunaSearch):
    """Ray Tune's Optuna search, with a study that stays true whatever happens to a trial or to the driver.

    Ray's own class tells Optuna that a trial stopped by ASHA is complete, with its low-rung value; here it is pruned,
    with its intermediate values by epoch, and one that failed or gave NaN has failed. Its state is the study, so that
    nothing is pickled.

    Args:
        space: draws settings.
        config: of one student, as it stands; what the baseline trial is.
        storage: of the study.
        study_name: of the study.
        sampler: seeded.
        on_end: gets the number of a trial that has ended, and whether its own process died.
    """

    def __init__(
        self,
        space: Space,
        config: RunConfig,
        storage: BaseStorage,
        study_name: str,
        sampler: optuna.samplers.BaseSampler,
        on_end: Told,
    ) -> None:
        several = len(space.metrics) > 1
        super().__init__(
            space=_drawn_here,
            metric=list(space.metrics) if several else space.metrics[0],
            mode=list(space.modes) if several else space.modes[0],
            sampler=sampler,
            study_name=study_name,
            storage=storage,
        )
        self._krd_space, self._config, self._on_end = space, config, on_end

    @property
    def study(self) -> optuna.Study:
        """The study that it writes."""
        assert self._ot_study is not None
        return self._ot_study

    def number_of(self, trial_id: str) -> int:
        """Returns the study's number of one of Ray Tune's trials."""
        return int(self._ot_trials[trial_id].number)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Draws the next trial, or takes the next one that is queued; one that cannot be drawn fails by itself."""
        trial = self.study.ask()
        self._ot_trials[trial_id] = trial
        if trial.user_attrs.get(names.BASELINE):
            self._krd_space.settings(Present(self._config, trial))
            settings: dict[str, Any] = {}
        else:
            try:
                settings = self._krd_space.settings(trial)
            except ConfigError as error:  # in a branch that nothing drew before
                return {NUMBER: trial.number, LAID: {}, TRIAL_ERROR: error.message}
        trial.set_user_attr(names.SETTINGS, settings)
        return {NUMBER: trial.number, LAID: settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Writes a validation row of a single objective down as an intermediate value of its epoch."""
        trial, (first, *others) = self._ot_trials[trial_id], self._krd_space.metrics
        if STATUS not in result:
            seen = {key: value for key, value in result.items() if key.startswith("val/")}
            trial.set_user_attr(names.FIGURES, seen)
            trial.set_user_attr(names.EPOCHS, result[EPOCH])
            if not others and first in result:
                trial.report(result[first], result[EPOCH])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the study how a trial ended: complete, pruned or failed."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        figures = trial.user_attrs.get(names.FIGURES, {})
        values = [figures.get(metric) for metric in self._krd_space.metrics]
        message = result.get(TRIAL_ERROR)
        lost = error or STATUS not in result
        if lost:
            message = message or "the trial's own process died"
        elif result[STATUS] == "finished" and not all(_is_finite(value) for value in values):
            message = f"its last validation row has no finite {', '.join(self._krd_space.metrics)}"
        trial.set_user_attr(names.SECONDS, result.get("time_total_s"))
        if message is not None:
            trial.set_user_attr(names.ERROR, message)
            self.study.tell(trial, state=TrialState.FAIL)
        elif result[STATUS] == "finished":
            self.study.tell(trial, values)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)
        self._on_end(trial.number, lost)

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its settings into a file that nobody reads; the study is where the truth is."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Writes where the truth is; Ray Tune wants a file."""
        Path(checkpoint_path).write_text(f"see the study {self._study_name}\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Is never used: `krd tune --resume` opens the study."""
        raise NotImplementedError(
            f"{checkpoint_path}: a search goes on with `krd tune --resume`, from its study"
        )


class StopByFile(ASHAScheduler):
    """Successive halving (ASHA, arXiv 1810.05934) in which a trial that has lost ends itself.

    Ray Tune would kill the trial's process, and the Ray Train run inside it would leave its reservation behind.
    Here the student's folder gets a file; its workers see it within a second (with several workers: at the end of the
    epoch), return, and everything that the trial held is given back in order.

    Args:
        metric, mode: of the search.
        epochs: of a trial.
        grace: epochs before anything is stopped.
        run: the search's folder.
        number_of: the study's number of one of Ray Tune's trials.
    """

    def __init__(
        self, metric: str, mode: str, *, epochs: int, grace: int, run: RunDir, number_of: Callable[[str], int]
    ) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=metric,
            mode=mode,
            max_t=epochs,
            grace_period=grace,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        )
        self._run, self._number_of, self._stopped = run, number_of, set[str]()

    def __getstate__(self) -> dict[str, Any]:
        """As for the search: what Ray Tune pickles is never read."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Compares a trial at its rung with those that were there before; it is asked to stop, never killed."""
        if trial.trial_id in self._stopped or STATUS in result:
            return str(TrialScheduler.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped.add(trial.trial_id)
            self._run.student(str(self._number_of(trial.trial_id))).stop.touch()
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forgets a trial; its last row has been compared already."""
        del tune_controller, result
        self._trial_info.pop(trial.trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing worth reading: rungs begin anew in a resumed search."""
        Path(checkpoint_path).write_text("", encoding="utf-8")


def scheduler_for(
    space: Space, *, epochs: int, grace: int | None, run: RunDir, number_of: Callable[[str], int]
) -> TrialScheduler:
    """Returns what stops trials early: ASHA for one objective, nothing for two or where it is switched off.

    Args:
        space: with metrics and modes.
        epochs: of a trial.
        grace: epochs before anything is stopped; None: nothing is.
        run: the search's folder.
        number_of: the study's number of one of Ray Tune's trials.
    """
    if grace is None or len(space.metrics) > 1:
        return FIFOScheduler()
    (metric,), (mode,) = space.metrics, space.modes
    return StopByFile(metric, mode, epochs=epochs, grace=min(grace, epochs), run=run, number_of=number_of)


def _drawn_here(trial: optuna.Trial) -> None:
    """Stands for the space: `StudySearch.suggest` draws from it itself."""


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
