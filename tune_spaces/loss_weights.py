"""How strongly the teacher's features and logits count beside the labels."""

from __future__ import annotations

from typing import Any

METRIC = "val/few"
MODE = "max"
BASELINE = True


def space(trial: Any) -> None:
    trial.suggest_float("loss.rrd.weight", 0.1, 10.0, log=True)
    trial.suggest_float("loss.lrd.weight", 0.1, 10.0, log=True)
    trial.suggest_float("loss.classification.weight", 0.1, 2.0, log=True)
