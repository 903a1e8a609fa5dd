"""Answers what a search space file says: which settings are drawn, which metric decides, what comes first.

Does not draw anything and does not know the config (`check` brings both together).
"""

from __future__ import annotations

import difflib
import hashlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from krd_ray.errors import ConfigError
from krd_ray.tune.declared import declared_space

Mode = Literal["max", "min"]
Settings = dict[str, Any]
Suggest = Callable[[Any], Mapping[str, Any] | None]

PREFIX = "val/"
BETTER: dict[str, Mode] = {
    **dict.fromkeys(("top1", "many", "medium", "few", "balanced", "worst_class", "harmonic_mean"), "max"),
    **dict.fromkeys(("ece", "loss"), "min"),
}
"""Metrics of a `val` row, and which way each is better."""
KNOWN = ("METRIC", "MODE", "BASELINE", "space")


@dataclass(frozen=True)
class Space:
    """A search space as its file says it.

    Args:
        path: of the file, for messages.
        text: of the file; a search keeps a copy.
        suggest: draws one trial's settings from an Optuna trial; may return further fixed ones.
        metrics: names as in METRIC, `val/...`, one or two.
        modes: `max` or `min`, as many.
        baseline: the first trial is the config as it stands.
    """

    path: Path
    text: str
    suggest: Suggest
    metrics: tuple[str, ...]
    modes: tuple[Mode, ...]
    baseline: bool

    @property
    def text_hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def settings(self, trial: Any) -> Settings:
        """Draws one trial's settings: what the file suggests, and what it returns besides.

        Args:
            trial: has Optuna's `suggest_*`; its `params` are what was suggested.
        Raises:
            ConfigError: the file's `space` raises, or returns something else than a mapping.
        """
        try:
            fixed = self.suggest(trial)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.path}: space() raised {_where(error, self.path)}") from error
        if fixed is not None and not isinstance(fixed, Mapping):
            raise ConfigError(
                f"{self.path}: space() returned {type(fixed).__name__}; return nothing, or a mapping of dotted "
                "names to the values that this trial gets besides"
            )
        return {**trial.params, **(fixed or {})}


def load_space(path: Path) -> Space:
    """Reads a search space: a Python file with `space(trial)`, or its declarative YAML form.

    A Python file is run as code, like a model of one's own (`my_mod:fn`).

    Args:
        path: `*.py`, `*.yaml` or `*.yml`.
    Returns:
        The space.
    Raises:
        ConfigError: no such file, another ending, or something in it that a space may not say.
    """
    if not path.is_file():
        raise ConfigError(f"search space {path} does not exist; tune_spaces/ has files to start from")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        names: Mapping[str, Any] = declared_space(text, path)
    elif path.suffix == ".py":
        names = _run(text, path)
    else:
        raise ConfigError(f"search space {path}: expected a .py or a .yaml file")
    suggest = names.get("space")
    if not callable(suggest):
        raise ConfigError(f"{path} has no function space(trial); see tune_spaces/README.md")
    metrics = _metrics(names.get("METRIC"), path)
    modes = _modes(names.get("MODE"), metrics, path)
    baseline = names.get("BASELINE", True)
    if not isinstance(baseline, bool):
        raise ConfigError(f"{path}: BASELINE must be True or False, got {baseline!r}")
    return Space(path, text, suggest, metrics, modes, baseline)


def _run(text: str, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": f"krd_space_{path.stem}", "__file__": str(path)}
    try:
        code: CodeType = compile(text, str(path), "exec")
        exec(code, names)  # noqa: S102 - the user's own file, named on the command line
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {_where(error, path)}") from error
    shouted = [name for name in names if name.isupper() and name.isalpha() and name not in KNOWN]
    for name in shouted:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.75)
        if near:
            raise ConfigError(f"{path}: {name} means nothing here; did you mean {near[0]}?")
    return names


def _where(error: Exception, path: Path) -> str:
    """An error of the user's file with its line in it."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


def _metrics(value: Any, path: Path) -> tuple[str, ...]:
    metrics = (value,) if isinstance(value, str) else tuple(value or ())
    if not 1 <= len(metrics) <= 2 or not all(isinstance(metric, str) for metric in metrics):
        raise ConfigError(
            f"{path}: METRIC must name one or two metrics, for instance 'val/few'; got {value!r}"
        )
    if len(set(metrics)) < len(metrics):
        raise ConfigError(f"{path}: METRIC names {metrics[0]} twice")
    for metric in metrics:
        _check_metric(metric, path)
    return metrics


def _check_metric(metric: str, path: Path) -> None:
    known = [f"{PREFIX}{name}" for name in BETTER]
    if metric in known:
        return
    split, _, name = metric.rpartition("/")
    near = difflib.get_close_matches(f"{PREFIX}{name}", known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    if split == "test":
        raise ConfigError(
            f"{path}: METRIC {metric!r}: a search never selects on the test split, which is read once, at the end; "
            f"{hint}"
        )
    raise ConfigError(f"{path}: METRIC {metric!r} is no metric of a validation row; {hint}")


def _modes(value: Any, metrics: tuple[str, ...], path: Path) -> tuple[Mode, ...]:
    modes = (value,) if isinstance(value, str) else tuple(value or ())
    expected = [BETTER[metric.removeprefix(PREFIX)] for metric in metrics]
    if list(modes) == expected:
        return tuple(expected)
    given = "is missing" if value is None else f"is {value!r}"
    wanted = expected[0] if len(expected) == 1 else expected
    raise ConfigError(f"{path}: MODE {given}; for METRIC {', '.join(metrics)} it must be {wanted!r}")
