"""Answers how a trial's settings become a student: dotted names laid over the config by the config's own language.

Does not draw settings and does not train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from krd_ray.config import RunConfig, StudentConfig
from krd_ray.config_io import apply_value, parse_config
from krd_ray.errors import ConfigError

SHARED = {
    "data": "all trials read the same shards",
    "views": "all trials share one teacher, which must see the same views",
    "teacher": "all trials share one teacher",
    "seed": "it is the seed of the views, which all trials share; use students.<name>.seed for a student's own",
    "ray": "all trials run in one cluster",
}
PLACES = {
    "resources": "all trials reserve the same, so that it is known how many fit",
    "strategy": "all trials reserve the same, so that it is known how many fit",
    "workers": "all trials reserve the same, so that it is known how many fit",
    "name": "a trial goes by its number",
    "method": "a trial goes by its number",
}
OPEN = ("loss", "train", "students")
COUNTED = {
    "train.epochs": "trials are compared after the same number of epochs; use `krd tune --epochs`",
    "train.val_every_epochs": "trials are compared by their validation rows",
}


def only_student(config: RunConfig, name: str | None) -> RunConfig:
    """Returns the config with the one student that a search is about.

    Args:
        config: with one student or several.
        name: which of several; None where there is one.
    Raises:
        ConfigError: several and no name, or none of that name.
    """
    names = [student.name for student in config.students]
    if name is None and len(names) > 1:
        raise ConfigError(
            f"a search tunes one student, the config has {len(names)}: {', '.join(names)}. Leave one in `students`, "
            f"or choose one with --student {names[0]}"
        )
    chosen = [student for student in config.students if name in (None, student.name)]
    if not chosen:
        raise ConfigError(f"--student {name}: the config has no such student; it has {', '.join(names)}")
    return config.model_copy(update={"students": chosen})


def lay(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Lays a trial's settings over the config.

    Args:
        config: of one student.
        settings: dotted name -> value.
    Returns:
        The checked config, what `krd distill` takes.
    Raises:
        ConfigError: a name that a search may not touch, an unknown one (with the nearest), a value out of range.

    Example:
        >>> students = [StudentConfig(name="s", model="resnet8")]
        >>> config = RunConfig(name="run", data={"dir": "shards"}, students=students)
        >>> lay(config, {"loss.rrd.weight": 2.0}).loss.rrd.weight
        2.0
    """
    raw = copy.deepcopy(config.model_dump(mode="json"))
    for name, value in settings.items():
        _refuse_shared(name)
        _refuse_hidden(config, name)
        try:
            apply_value(raw, name, value)
        except ConfigError as error:
            raise ConfigError(error.message.removeprefix("--set ")) from error
    return parse_config(raw)


def trial_student(config: RunConfig, settings: Mapping[str, Any], name: str) -> StudentConfig:
    """Returns the student of a trial, with everything that the settings decide written into it.

    Args:
        config: of one student, as it stands.
        settings: dotted name -> value.
        name: of the trial.
    """
    laid = lay(config, settings)
    (student,) = laid.students
    return student.model_copy(
        update={
            "name": name,
            "seed": laid.seed_of(student),
            "loss": laid.loss_of(student).model_dump(),
            "train": laid.train_of(student).model_dump(),
        }
    )


def present_value(config: RunConfig, name: str) -> Any:
    """Returns what the config says under a dotted name.

    Raises:
        ConfigError: there is no such setting.
    """
    (student,) = config.students
    owner, *rest = name.split(".")
    if owner == "students":
        # A student's name may hold dots itself.
        prefix = f"students.{student.name}."
        rest = name.removeprefix(prefix if name.startswith(prefix) else "students.0.").split(".")
        own: Any = student.model_dump(mode="json")
        own |= {
            "loss": config.loss_of(student).model_dump(),
            "train": config.train_of(student).model_dump(),
        }
        return _follow(own, rest, name)
    return _follow(config.model_dump(mode="json")[owner], rest, name)


def _follow(node: Any, keys: Iterable[str], name: str) -> Any:
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            raise ConfigError(f"{name}: the config has no such setting")
        node = node[key]
    return node


def _refuse_shared(name: str) -> None:
    parts = name.split(".")
    if parts[0] in SHARED:
        raise ConfigError(f"{name} cannot be searched: {SHARED[parts[0]]}")
    for counted, reason in COUNTED.items():
        if name == counted or (parts[0] == "students" and name.endswith(f".{counted}")):
            raise ConfigError(f"{name} cannot be searched: {reason}")
    if parts[0] == "students" and not {"loss", "train"} & set(parts):
        for place in set(parts[2:]) & PLACES.keys():
            raise ConfigError(f"{name} cannot be searched: {PLACES[place]}")
    if parts[0] in RunConfig.model_fields and parts[0] not in OPEN:
        raise ConfigError(
            f"{name} cannot be searched; a space may set {', '.join(f'{part}.*' for part in OPEN)}"
        )


def _refuse_hidden(config: RunConfig, name: str) -> None:
    """A run's setting that its one student overrides would have no effect."""
    (student,) = config.students
    owner, *rest = name.split(".")
    node: Any = {"loss": student.loss, "train": student.train}.get(owner)
    for key in rest:
        if not isinstance(node, Mapping) or key not in node:
            return
        node = node[key]
    if node is not None:
        raise ConfigError(
            f"{name} would change nothing: student {student.name} sets it itself; search "
            f"students.{student.name}.{name}"
        )
