"""What the teacher's features and logits are rectified to: the form first, then what only that form has."""

from __future__ import annotations

from typing import Any

METRIC = "val/balanced"
MODE = "max"
BASELINE = True


def space(trial: Any) -> None:
    target = trial.suggest_categorical("loss.rrd.target", ["teacher", "balanced", "mix"])
    if target != "teacher":
        trial.suggest_categorical("loss.rrd.prior", ["auto", "sphere", "class_mean"])
        gate = trial.suggest_categorical("loss.rrd.gate", ["full", "constant", "by_count"])
        if gate == "constant":
            trial.suggest_float("loss.rrd.gate_strength", 0.1, 0.9)
    trial.suggest_categorical("loss.rrd.form", ["cosine", "norm_aware"])
    trial.suggest_categorical("loss.lrd.space", ["balanced", "long_tailed"])
    weighting = trial.suggest_categorical("loss.lrd.weighting", ["none", "effective_number"])
    if weighting == "effective_number":
        trial.suggest_categorical("loss.lrd.beta", [0.99, 0.999, 0.9999])
    trial.suggest_categorical("loss.lrd.gate", ["none", "confidence"])
    trial.suggest_float("loss.lrd.tau_prior", 0.5, 2.5)
