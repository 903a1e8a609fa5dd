"""Few-shot accuracy against accuracy over all classes: two objectives, and the trials that nothing beats in both."""

from __future__ import annotations

from typing import Any

METRIC = ["val/few", "val/top1"]
MODE = ["max", "max"]
BASELINE = True


def space(trial: Any) -> None:
    trial.suggest_float("loss.lrd.tau_prior", 0.5, 2.5)
    trial.suggest_float("loss.lrd.weight", 0.25, 4.0, log=True)
    trial.suggest_float("loss.rrd.weight", 0.25, 4.0, log=True)
    trial.suggest_categorical("loss.classification.name", ["cross_entropy", "balanced_softmax"])
