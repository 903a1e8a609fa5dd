"""Answers how the declarative form of a search space, a YAML file without code, becomes a function that draws.

Does not read files and does not check names against the config (`check` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from krd_ray.config_io import explain_error
from krd_ray.config_loss import Strict
from krd_ray.errors import ConfigError

Value = bool | int | float | str | None


class Parameter(Strict):
    """One setting that is drawn: from a range, or from a list of choices; `when` makes it conditional."""

    type: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: list[Value] | None = None
    when: dict[str, Value | list[Value]] = Field(
        default_factory=dict, description="drawn only where these, listed above, have one of these values"
    )

    @model_validator(mode="after")
    def _says_what_it_draws_from(self) -> Parameter:
        if self.type == "choice":
            if not self.choices:
                raise ValueError("type choice needs choices, a list of values")
        elif self.low is None or self.high is None or self.low > self.high:
            raise ValueError(f"type {self.type} needs low and high, low not above high")
        return self

    def applies(self, drawn: Mapping[str, Any]) -> bool:
        """Returns whether the parameters drawn so far meet `when`."""
        return all(
            name in drawn and drawn[name] in (wanted if isinstance(wanted, list) else [wanted])
            for name, wanted in self.when.items()
        )

    def draw(self, trial: Any, name: str) -> Any:
        """Asks an Optuna trial for a value."""
        if self.type == "choice":
            return trial.suggest_categorical(name, self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.type == "int":
            step = int(self.step) if self.step is not None else 1
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log, step=step)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)


class Declared(Strict):
    """A whole file."""

    metric: str | list[str]
    mode: str | list[str]
    baseline: bool = True
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]

    @model_validator(mode="after")
    def _conditions_look_up(self) -> Declared:
        above: list[str] = []
        for name, parameter in self.parameters.items():
            for condition in parameter.when:
                if condition not in above:
                    raise ValueError(
                        f"parameters.{name}.when: {condition} is not a parameter listed above it"
                    )
            above.append(name)
        return self

    def suggest(self, trial: Any) -> None:
        """Draws the parameters in the order of the file."""
        drawn: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.applies(drawn):
                drawn[name] = parameter.draw(trial, name)


def declared_space(text: str, path: Path) -> dict[str, Any]:
    """Returns what a Python file would define: METRIC, MODE, BASELINE, space.

    Args:
        text: YAML with `metric`, `mode`, `parameters`, and `baseline` if it is to be false.
        path: for messages.
    Raises:
        ConfigError: broken YAML, an unknown key, a range without bounds, a condition on what is not drawn before.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping with metric, mode and parameters")
    try:
        declared = Declared.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain_error(error, Declared)}") from error
    return {
        "METRIC": declared.metric,
        "MODE": declared.mode,
        "BASELINE": declared.baseline,
        "space": declared.suggest,
    }
