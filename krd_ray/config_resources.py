"""Answers what a process reserves and on which nodes it may run, in Ray's own words.

Does not look at a cluster (`train.places` does): these are wishes, not facts.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from krd_ray.config_loss import NonNegative, Strict

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
SoftStrategy = Literal["PACK", "SPREAD"]
_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SELECTOR = re.compile(rf"(!?)(?:({_VALUE})|in\(({_VALUE}(?:, ?{_VALUE})*)\))")


class Resources(Strict):
    """What one Ray process reserves and where it may run. These are Ray's logical resources, not limits on use."""

    num_cpus: NonNegative = 1.0
    num_gpus: NonNegative = 0.0
    custom: dict[str, float] = Field(
        default_factory=dict, description="resources of one's own, as nodes name them: {teacher: 0.01}"
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels a node must have: {role: teacher}; also `!value`, `in(a, b)` and `!in(a, b)`",
    )

    @model_validator(mode="after")
    def _ray_takes_them(self) -> Resources:
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus above 1 must be a whole number, got {self.num_gpus:g}")
        reserved = sorted({"CPU", "GPU", "memory", "object_store_memory"} & self.custom.keys())
        if reserved:
            raise ValueError(f"custom names Ray's own {', '.join(reserved)}; use num_cpus and num_gpus")
        for name, wanted in self.node_labels.items():
            if SELECTOR.fullmatch(wanted) is None:
                raise ValueError(
                    f"node_labels.{name} must be a value, `!value`, `in(a, b)` or `!in(a, b)`, got {wanted!r}"
                )
        return self

    def as_ray(self) -> dict[str, float]:
        """Returns the resources under Ray's own names, zero entries left out."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.custom}
        return {key: value for key, value in named.items() if value > 0}

    def actor_options(self, strategy: Strategy) -> dict[str, Any]:
        """Returns the options of `ray.remote` for an actor that reserves this.

        Args:
            strategy: SPREAD and STRICT_SPREAD: the node that has most room; else Ray's default, which fills a node
                up to a half before it takes the next. What is strict is so only between workers of one student,
                which share a placement group. DEFAULT is named because a process inside a placement group, such
                as a trial of Ray Tune, would otherwise draw its own actors into it.
        """
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": self.custom or None,
            "label_selector": self.node_labels or None,
            "scheduling_strategy": "SPREAD" if strategy.endswith("SPREAD") else "DEFAULT",
        }


def has_labels(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    """Returns whether a node is one of those wanted; a label that it lacks equals no value.

    Args:
        wanted: as `Resources.node_labels`.
        labels: of the node.

    Example:
        >>> has_labels({"zone": "in(a, b)", "market": "!spot"}, {"zone": "b"})
        True
    """
    return all(_matches(selector, labels.get(name)) for name, selector in wanted.items())


def one_of(selector: str) -> str:
    """Returns a value of those that a selector of `Resources.node_labels` takes.

    Example:
        >>> one_of("in(a, b)"), one_of("!spot")
        ('a', 'not-spot')
    """
    negated, values = _parts(selector)
    return f"not-{values[0]}" if negated else values[0]


def _matches(selector: str, value: str | None) -> bool:
    negated, values = _parts(selector)
    return (value in values) != negated


def _parts(selector: str) -> tuple[bool, list[str]]:
    """Whether the values are those a node must not have, and the values."""
    found = SELECTOR.fullmatch(selector)
    assert found is not None
    negated, single, several = found.groups()
    return bool(negated), [single] if single else re.split(", ?", several)
