"""How soft the teacher's logits are compared, and how much of the label prior is taken off them."""

from __future__ import annotations

from typing import Any

METRIC = "val/balanced"
MODE = "max"
BASELINE = True


def space(trial: Any) -> None:
    trial.suggest_float("loss.lrd.temperature", 1.0, 8.0, log=True)
    trial.suggest_float("loss.lrd.tau_prior", 0.5, 2.5)
    trial.suggest_float("loss.lrd.weight", 0.25, 4.0, log=True)
