"""Answers how a config file and `--set a.b=c` become a checked `RunConfig`, and how one is written back.

Does not hold settings or defaults (`config` does).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from krd_ray.config import MethodConfig, RunConfig, StudentConfig, TrainConfig, merge
from krd_ray.config_loss import LossConfig
from krd_ray.errors import ConfigError

Location = tuple[int | str, ...]


def load_config(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, lays `--set` settings over it and checks the result.

    Args:
        path: YAML file; read with the safe loader.
        settings: `a.b=c` texts; c is read as YAML; list elements by index or by their `name`.
    Returns:
        The checked config.
    Raises:
        ConfigError: no such file, broken YAML, unknown key (with the nearest valid one), wrong type or range.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(raw).__name__}")
    for setting in settings:
        apply_setting(raw, setting)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Checks a mapping against the schema; all problems are reported at once, each by its dotted name."""
    try:
        config = RunConfig.model_validate(raw)
        _check_parts(config)
        return config.expanded()
    except ValidationError as error:
        raise ConfigError(_explain(error, RunConfig, ())) from error


def _check_parts(config: RunConfig) -> None:
    """Checks what students and methods lay over the run's `loss` and `train`."""
    parts: list[tuple[Location, StudentConfig | MethodConfig]] = [
        (("students", index), student) for index, student in enumerate(config.students)
    ]
    if config.compare is not None:
        parts += [(("compare", "methods", name), method) for name, method in config.compare.methods.items()]
    for where, owner in parts:
        for part, model in (("loss", LossConfig), ("train", TrainConfig)):
            base = getattr(config, part).model_dump()
            try:
                model.model_validate(merge(base, getattr(owner, part)))
            except ValidationError as error:
                raise ConfigError(_explain(error, model, (*where, part))) from error


def apply_setting(raw: dict[str, Any], setting: str) -> None:
    """Sets one dotted name in `raw`, in place; missing mappings on the way are made.

    Raises:
        ConfigError: no `=`, or the way leads through something that is neither mapping nor list.

    Example:
        >>> raw = {"students": [{"name": "small", "model": "resnet8"}]}
        >>> apply_setting(raw, "students.small.model=resnet20"); raw["students"][0]["model"]
        'resnet20'
    """
    name, separator, text = setting.partition("=")
    if not separator or not name:
        raise ConfigError(f"--set {setting!r}: expected a.b=value, for instance --set train.epochs=10")
    apply_value(raw, name, _parse_value(text, name))


def apply_value(raw: dict[str, Any], name: str, value: Any) -> None:
    """Sets one dotted name in `raw` to a value that is not text to be parsed; otherwise as `apply_setting`."""
    node: Any = raw
    keys = name.split(".")
    while len(keys) > 1:
        size = _key_size(node, keys)
        node = _step(node, ".".join(keys[:size]), name)
        keys = keys[size:]
    last = keys[0]
    if isinstance(node, list):
        node[_list_index(node, last, name)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {name}: the part before .{last} is not a mapping")


def _key_size(node: Any, keys: Sequence[str]) -> int:
    """How many of the dotted parts are one key: names of list elements may hold dots themselves."""
    names = [item.get("name") for item in node if isinstance(item, dict)] if isinstance(node, list) else []
    fitting = [size for size in range(1, len(keys)) if ".".join(keys[:size]) in names]
    return max(fitting, default=1)


def _parse_value(text: str, name: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}: {text!r} is not a YAML value") from error
    # YAML 1.1 reads 1e-3 as text; people mean a number.
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def _step(node: Any, key: str, name: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, name)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {name}: the part before .{key} is not a mapping")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _list_index(items: list[Any], key: str, name: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    known = ", ".join(str(item) for item in names if item) or f"0 to {len(items) - 1}"
    raise ConfigError(f"--set {name}: there is no element {key!r}; there are: {known}")


def dump_config(config: RunConfig) -> str:
    """Returns the config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def explain_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Returns what is wrong with a file of settings, a line per problem, each by its dotted name."""
    return _explain(error, model, ())


def _explain(error: ValidationError, model: type[BaseModel], prefix: Location) -> str:
    lines = [_explain_one(detail, model, prefix) for detail in error.errors()]
    return "\n".join(lines)


def _explain_one(detail: ErrorDetails, model: type[BaseModel], prefix: Location) -> str:
    location = detail["loc"]
    name = ".".join(str(part) for part in (*prefix, *location)) or "config"
    if detail["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"valid names here: {', '.join(valid)}"
        return f"{name}: unknown setting; {hint}"
    if detail["type"] == "missing":
        return f"{name}: this setting is required"
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name}: {text}"
    return f"{name}: {text}, got {detail['input']!r}"


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the settings of the sub-model that `location` leads to."""
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is not None:
            current = next(iter(_models_in(field.annotation)), current)
    return list(current.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
