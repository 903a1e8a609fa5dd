"""Answers what the quality benchmark consists of: data sets, teachers, runs and the tables made of them.

Does not run anything (`__main__` does). What a run trains stands in its YAML file under `configs/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIGS = Path(__file__).parent / "configs"
Form = Literal["cpu", "gpu"]
VAL_PER_CLASS = 40


@dataclass(frozen=True)
class FormSpec:
    """What differs between the two forms: side of the images in pixels."""

    side: int


# Ratio 100 keeps 10,847 images, 50 keeps 12,608 and 10 keeps 19,573: with the epochs scaled down by as much, each
# ratio gets about the same number of steps.
EPOCH_SHARE = {100: 1.0, 50: 10_847 / 12_608, 10: 10_847 / 19_573}


@dataclass(frozen=True)
class RunSpec:
    """One `krd distill`: its config file, the ratio of its shards and teacher, the teacher's config file."""

    config: str
    ratio: int
    teacher: str = "teacher"

    @property
    def name(self) -> str:
        return f"{self.config}-{self.ratio}"


@dataclass(frozen=True)
class Part:
    """One table of the README.

    Args:
        runs: run directories that the table joins.
        split: `val` where something is chosen by the table, `test` where it is reported.
        against: method that paired differences are taken to.
    """

    runs: tuple[RunSpec, ...]
    split: Literal["val", "test"]
    against: str | None = None


FORMS = {"cpu": FormSpec(side=16), "gpu": FormSpec(side=32)}

PARTS: dict[str, dict[str, Part]] = {
    "cpu": {
        "ablation": Part((RunSpec("ablation", 100),), "val", against="krd"),
        "main": Part((RunSpec("main", 100),), "test", against="krd"),
        "imbalance": Part(
            tuple(RunSpec("imbalance", ratio, "imbalance_teacher") for ratio in (100, 50, 10)), "test"
        ),
        "compression": Part((RunSpec("compression", 100),), "test"),
    },
    "gpu": {"main": Part((RunSpec("main", 100),), "test", against="krd")},
}
