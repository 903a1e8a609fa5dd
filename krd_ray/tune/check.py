"""Answers whether a search can start: every name a setting, every drawn value allowed, every metric countable.

Does not touch Ray: a search that cannot work ends here, before a cluster is asked for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from krd_ray.config import RunConfig, StudentConfig
from krd_ray.errors import ConfigError, DataError, ResourceError
from krd_ray.models.outputs import feature_dim_of
from krd_ray.teacher.weights import load_model
from krd_ray.train.prepare import Prepared
from krd_ray.train.teaching import check_store_budget
from krd_ray.tune.laying import present_value, trial_student
from krd_ray.tune.space import PREFIX, Settings, Space

NUM_SAMPLES = 64
GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class Probe:
    """What drawing from a space a few dozen times has shown.

    Args:
        names: all parameters, in order of first appearance.
        students: trials that differ in what must be prepared: model, terms, priors.
        needs_teacher: some trial learns from the teacher; those come first in `students`.
    """

    names: tuple[str, ...]
    students: tuple[StudentConfig, ...]
    needs_teacher: bool

    @property
    def typical(self) -> StudentConfig:
        """A trial as demanding as any: all reserve the same."""
        return self.students[0]


def probe_space(space: Space, config: RunConfig, *, seed: int) -> Probe:
    """Draws random trials from a space, without Ray, and lays each over the config.

    Args:
        space: as its file says it.
        config: of one student.
        seed: of the draws.
    Returns:
        What they have in common and where they differ.
    Raises:
        ConfigError: a name that is no setting (with the nearest one), a value that the config refuses, an empty
            space, a setting that all trials must share.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    names: dict[str, None] = {}
    found: dict[tuple[Any, ...], StudentConfig] = {}
    drawn: list[Settings] = [{}] if space.baseline else []
    for _ in range(NUM_SAMPLES):
        trial = study.ask()
        drawn.append(space.settings(trial))
        names |= dict.fromkeys(trial.params)
    if not names:
        raise ConfigError(f"{space.path}: the space is empty: space(trial) calls no trial.suggest_...")
    for settings in drawn:
        student = _laid(space, config, settings)
        loss = config.loss_of(student)
        train = config.train_of(student)
        key = (student.model, *loss.active_terms, loss.rrd.prior, train.precision)
        found.setdefault(key, student.model_copy(update={"name": f"{student.name}.drawn{len(found)}"}))
    students = sorted(found.values(), key=lambda each: config.loss_of(each).needs_teacher, reverse=True)
    return Probe(tuple(names), tuple(students), config.loss_of(students[0]).needs_teacher)


def _laid(space: Space, config: RunConfig, settings: Settings) -> StudentConfig:
    try:
        return trial_student(config, settings, "trial")
    except ConfigError as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ConfigError(f"{space.path}: {error.message}\n  (drawn: {shown})") from error


def check_metrics(space: Space, prepared: Prepared) -> None:
    """Checks that each metric of the space can be counted on the validation split.

    Raises:
        DataError: no validation split, or no validation image of a class group.
    """
    manifest = prepared.manifest
    if prepared.val is None:
        raise DataError(
            f"{prepared.config.data.dir} has no validation split, on which a search selects; write the shards with "
            "`krd shards --val-per-class N`"
        )
    sizes = manifest.group_sizes()
    for metric in space.metrics:
        group = metric.removeprefix(PREFIX)
        if group in GROUPS and not sizes.get(group):
            there = [f"{PREFIX}{name}" for name in GROUPS if sizes.get(name)]
            raise DataError(
                f"{space.path}: METRIC {metric}: these shards have no {group}-shot class; they have "
                f"{', '.join(there) or 'no group'}, and val/balanced always"
            )


def check_store(prepared: Prepared, probe: Probe, *, epochs: int, confirm_epochs: int) -> None:
    """Checks that the search's store holds every view that trials and the confirmation ask for.

    Args:
        prepared: the search.
        probe: its kinds of trials.
        epochs: of a trial.
        confirm_epochs: of the confirmation; 0 without one.
    Raises:
        ResourceError: they do not fit `teacher.disk_bytes`.
    """
    teacher, cycle = prepared.config.teacher, prepared.config.views.cycle
    if teacher is None or not probe.needs_teacher:
        return
    model, _ = load_model(
        teacher.weights,
        model=teacher.model,
        num_classes=prepared.manifest.num_classes,
        image_size=prepared.view.side,
    )
    who = "the confirmation" if confirm_epochs > epochs else "a trial"
    why = "views.cycle" if cycle else f"views.cycle is null: one for each epoch of {who}"
    views = cycle or max(epochs, confirm_epochs)
    try:
        check_store_budget(prepared, feature_dim_of(model), views)
    except ResourceError as error:
        raise ResourceError(
            f"the search's store is to hold {views} view(s) of every image ({why}): {error.message}"
        ) from error


def as_it_stands(space: Space, config: RunConfig) -> Settings:
    """Returns what the space's parameters are in the config as it stands.

    A parameter whose value the space would never draw (a weight of 0 below a logarithmic range) is left out: the
    baseline is the config, not the nearest point of the space.
    """
    present = Present(config)
    space.settings(present)
    return present.params


class Present:
    """Answers `suggest_*` with what the config says; `params` keeps what the space could have drawn.

    Args:
        config: of one student.
        trial: an Optuna trial that is told the values which the space could have drawn.
    """

    def __init__(self, config: RunConfig, trial: Any = None) -> None:
        self._config, self._trial = config, trial
        self.number = trial.number if trial is not None else 0
        self.params: Settings = {}

    def suggest_float(self, name: str, low: float, high: float, **how: Any) -> Any:
        distribution = optuna.distributions.FloatDistribution(low, high, **how)
        return self._answer(name, distribution, "suggest_float", (low, high), how)

    def suggest_int(self, name: str, low: int, high: int, **how: Any) -> Any:
        distribution = optuna.distributions.IntDistribution(low, high, **how)
        return self._answer(name, distribution, "suggest_int", (low, high), how)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        distribution = optuna.distributions.CategoricalDistribution(choices)
        return self._answer(name, distribution, "suggest_categorical", (choices,), {})

    def _answer(self, name: str, distribution: Any, method: str, bounds: Any, how: Any) -> Any:
        value = present_value(self._config, name)
        if not could_draw(distribution, value):
            return value
        self.params[name] = value
        if self._trial is not None:
            getattr(self._trial, method)(name, *bounds, **how)
        return value


def could_draw(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
    """Returns whether a distribution can give a value.

    Example:
        >>> weights = optuna.distributions.FloatDistribution(0.1, 10.0, log=True)
        >>> could_draw(weights, 1.0), could_draw(weights, 0.0), could_draw(weights, "much")
        (True, False, False)
    """
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    assert isinstance(
        distribution, optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution
    )
    if not distribution.low <= value <= distribution.high:
        return False
    if not distribution.step:
        return True
    steps = (value - distribution.low) / distribution.step
    return abs(steps - round(steps)) < 1e-8
