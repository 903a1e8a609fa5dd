"""Which student, and how strongly it listens to the teacher: a small one may need other weights than a large one.

`students.0` is the one student of the config, whatever it is called. Change the models to those you could ship.
"""

from __future__ import annotations

from typing import Any

METRIC = "val/balanced"
MODE = "max"
BASELINE = True


def space(trial: Any) -> None:
    trial.suggest_categorical("students.0.model", ["resnet8", "resnet14", "resnet20"])
    trial.suggest_float("loss.rrd.weight", 0.1, 10.0, log=True)
    trial.suggest_float("loss.lrd.weight", 0.1, 10.0, log=True)
