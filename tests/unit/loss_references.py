"""Answers what every loss of the registry should be: plain loops in float64, written from the papers' formulas.

Imports nothing of the code under test but its registries. Also draws inputs and lists the settings to try: what
`test_losses.py` and its neighbours share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS

Array = NDArray[Any]
Settings = dict[str, Any]
RECORDS = CLASSIFICATION_LOSSES | DISTILLATION_TERMS
STUDENT = frozenset({"student_logits", "projected_features"})
PER_CLASS = frozenset({"class_counts", "class_weights"})

LRD = {
    "temperature": 2.0,
    "tau_prior": 1.0,
    "space": "balanced",
    "weighting": "none",
    "beta": 0.99,
    "gate": "none",
}
# The first settings of each loss are the ones of tests that need only one.
SETTINGS: dict[str, list[Settings]] = {
    "cross_entropy": [{}],
    "balanced_softmax": [{"tau": 1.0}, {"tau": 0.3}],
    "class_balanced": [{"beta": 0.99}, {"beta": 0.0}],
    "focal": [{"gamma": 2.0}, {"gamma": 0.5}],
    "ldam": [{"max_margin": 0.5, "scale": 4.0}],
    "kd": [{"temperature": 4.0}, {"temperature": 1.0}],
    "dkd": [
        {"temperature": 4.0, "alpha": 1.0, "beta": 8.0},
        {"temperature": 1.0, "alpha": 0.5, "beta": 0.0},
    ],
    "bkd": [{"temperature": 2.0, "beta": 0.99}, {"temperature": 1.0, "beta": 0.9}],
    "ltkd": [
        {"temperature": 4.0, "alpha": 1.0, "beta": 1.0},
        {"temperature": 1.0, "alpha": 0.3, "beta": 2.0},
    ],
    "dive": [{"temperature": 3.0, "power": 0.5}, {"temperature": 1.0, "power": 1.5}],
    "cckd": [{"temperature": 4.0}, {"temperature": 1.0}],
    "nd": [{}],
    "pld": [{"temperature": 1.0}, {"temperature": 3.0}],
    "knowledge_adjustment": [{"temperature": 4.0}, {"temperature": 1.0}],
    "rrd": [{"form": "cosine"}, {"form": "norm_aware"}],
    "lrd": [
        LRD,
        LRD | {"space": "long_tailed"},
        LRD | {"weighting": "effective_number"},
        LRD | {"gate": "confidence"},
        LRD
        | {"space": "long_tailed", "weighting": "effective_number", "gate": "confidence", "tau_prior": 0.5},
    ],
}
CASES = [(name, settings) for name in RECORDS for settings in SETTINGS[name]]


def case_id(value: object) -> str:
    """Name of a loss, or its settings as a short label."""
    if isinstance(value, dict):
        return ",".join(f"{key}={setting}" for key, setting in value.items() if key != "beta") or "plain"
    return str(value)


def draw(seed: int, batch: int = 6, classes: int = 7, scale: float = 1.0) -> dict[str, Tensor]:
    """Random tensors for any loss; counts differ from class to class and stand in no order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return scale * torch.randn(batch, columns, generator=generator)

    order = torch.randperm(classes, generator=generator)
    return {
        "student_logits": normal(classes),
        "teacher_logits": normal(classes),
        "rectified_logits": normal(classes),
        "projected_features": normal(classes + 2),
        "rectified_features": normal(classes + 2),
        "labels": torch.randint(0, classes, (batch,), generator=generator),
        "class_counts": (500 * 0.01 ** (torch.arange(classes) / (classes - 1))).long()[order] + order,
        "class_weights": 0.5 + torch.rand(classes, generator=generator),
    }


def logits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, labels and counts of `draw`."""
    t = draw(seed)
    return t["student_logits"], t["teacher_logits"], t["labels"], t["class_counts"]


def call(name: str, tensors: dict[str, Tensor], settings: Settings) -> Tensor:
    """A loss as the objective calls it: by keyword, with the tensors and settings of its record."""
    record = RECORDS[name]
    assert set(settings) == set(record.params)
    return record.fn(**{key: tensors[key] for key in record.needs}, **settings)


def close(a: Tensor, b: Tensor, rel: float = 1e-5) -> None:
    """Fails unless two losses are the same but for rounding."""
    assert a.item() == pytest.approx(b.item(), rel=rel)


def student_of(name: str) -> str:
    """Name of the one tensor of a loss that is the student's."""
    (student,) = STUDENT & RECORDS[name].needs
    return student


def arrays_of(tensors: dict[str, Tensor]) -> dict[str, Array]:
    """The same values in NumPy, floats in float64."""
    return {key: (t.double() if t.is_floating_point() else t).numpy() for key, t in tensors.items()}


# ---- formulas of one sample


def log_softmax(z: Array) -> Array:
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def kl(log_p: Array, log_q: Array) -> float:
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def effective_number(counts: Array, beta: float) -> Array:
    """Sum of the geometric series 1 + beta + beta^2 + ..., n terms."""
    return np.array([(beta ** np.arange(int(n))).sum() for n in counts])


def class_weighted(log_p: Array, counts: Array, beta: float) -> Array:
    return log_softmax(log_p - np.log(effective_number(counts, beta)))


def weighted_mean(losses: list[float], weights: Array, labels: Array) -> float:
    return float(
        sum(weights[y] * loss for loss, y in zip(losses, labels, strict=True)) / weights[labels].sum()
    )


def norm_and_direction(f: Array, r: Array) -> float:
    length = float(np.sqrt(r @ r))
    return float(1 - (f @ (r / length)) / max(np.sqrt(f @ f), length))


# ---- one formula per loss: arrays and settings in, value out


def _cross_entropy(a: dict[str, Array], _s: Settings) -> float:
    losses = [-log_softmax(z)[y] for z, y in zip(a["student_logits"], a["labels"], strict=True)]
    return weighted_mean(losses, a["class_weights"], a["labels"])


def _balanced_softmax(a: dict[str, Array], s: Settings) -> float:
    losses = []
    for z, y in zip(a["student_logits"], a["labels"], strict=True):
        odds = a["class_counts"] ** float(s["tau"]) * np.exp(z - z.max())
        losses.append(-(np.log(odds[y]) - np.log(odds.sum())))
    return weighted_mean(losses, a["class_weights"], a["labels"])


def _class_balanced(a: dict[str, Array], s: Settings) -> float:
    weights = a["class_weights"] / effective_number(a["class_counts"], s["beta"])
    return _cross_entropy(a | {"class_weights": weights}, {})


def _focal(a: dict[str, Array], s: Settings) -> float:
    losses = []
    for z, y in zip(a["student_logits"], a["labels"], strict=True):
        log_p = log_softmax(z)
        others = np.exp(np.delete(log_p, y)).sum()
        losses.append(-(others ** s["gamma"]) * log_p[y])
    return weighted_mean(losses, a["class_weights"], a["labels"])


def _ldam(a: dict[str, Array], s: Settings) -> float:
    inverse = a["class_counts"].astype(float) ** -0.25
    margins = s["max_margin"] * inverse / inverse.max()
    losses = []
    for z, y in zip(a["student_logits"], a["labels"], strict=True):
        cosines = z / s["scale"]
        cosines[y] -= margins[y]
        losses.append(-log_softmax(s["scale"] * cosines)[y])
    return weighted_mean(losses, a["class_weights"], a["labels"])


def _distil(a: dict[str, Array], temperature: float, log_targets: list[Array]) -> float:
    students = [log_softmax(z / temperature) for z in a["student_logits"]]
    return float(temperature**2 * np.mean([kl(t, q) for t, q in zip(log_targets, students, strict=True)]))


def _kd(a: dict[str, Array], s: Settings) -> float:
    return _distil(a, s["temperature"], [log_softmax(z / s["temperature"]) for z in a["teacher_logits"]])


def _dive(a: dict[str, Array], s: Settings) -> float:
    targets = []
    for z in a["teacher_logits"]:
        flattened = np.exp(log_softmax(z / s["temperature"])) ** s["power"]
        targets.append(np.log(flattened / flattened.sum()))
    return _distil(a, s["temperature"], targets)


def _bkd(a: dict[str, Array], s: Settings) -> float:
    soft = [log_softmax(z / s["temperature"]) for z in a["teacher_logits"]]
    return _distil(a, s["temperature"], [class_weighted(p, a["class_counts"], s["beta"]) for p in soft])


def _knowledge_adjustment(a: dict[str, Array], s: Settings) -> float:
    targets = []
    for z, y in zip(a["teacher_logits"], a["labels"], strict=True):
        log_p = log_softmax(z / s["temperature"])
        top = int(np.argmax(log_p))
        log_p[top], log_p[y] = log_p[y], log_p[top]
        targets.append(log_p)
    return _distil(a, s["temperature"], targets)


def _cckd(a: dict[str, Array], s: Settings) -> float:
    temperature, losses = s["temperature"], []
    for z_s, z_t, y in zip(a["student_logits"], a["teacher_logits"], a["labels"], strict=True):
        belief = np.exp(log_softmax(z_t)[y])
        distil = temperature**2 * kl(log_softmax(z_t / temperature), log_softmax(z_s / temperature))
        losses.append(belief * distil - (1 - belief) * log_softmax(z_s)[y])
    return float(np.mean(losses))


def _dkd(a: dict[str, Array], s: Settings) -> float:
    losses = []
    for z_s, z_t, y in zip(a["student_logits"], a["teacher_logits"], a["labels"], strict=True):
        binary, rest = [], []
        for z in (z_t, z_s):
            others = np.delete(z, y) / s["temperature"]
            all_others = others.max() + np.log(np.exp(others - others.max()).sum())
            binary.append(log_softmax(np.array([z[y] / s["temperature"], all_others])))
            rest.append(log_softmax(others))
        losses.append(s["alpha"] * kl(*binary) + s["beta"] * kl(*rest))
    return float(s["temperature"] ** 2 * np.mean(losses))


def groups_of(counts: Array) -> list[list[int]]:
    """Head, medium and tail: 33 %, 34 % and 33 % of the classes, most frequent first."""
    ranked = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    side = round(0.33 * len(counts))
    return [ranked[:side], ranked[side : len(ranked) - side], ranked[len(ranked) - side :]]


def rebalanced_mass(a: dict[str, Array], temperature: float) -> Array:
    """Teacher's mass of each group, scaled to equal sums over the batch, then each sample to 1."""
    groups = groups_of(a["class_counts"])
    p = [np.exp(log_softmax(z / temperature)) for z in a["teacher_logits"]]
    mass = np.array([[row[group].sum() for group in groups] for row in p])
    scaled = mass * (mass.sum() / 3) / mass.sum(axis=0)
    return scaled / scaled.sum(axis=1, keepdims=True)


def _ltkd(a: dict[str, Array], s: Settings) -> float:
    groups, losses = groups_of(a["class_counts"]), []
    rebalanced = rebalanced_mass(a, s["temperature"])
    for z_s, z_t, target in zip(a["student_logits"], a["teacher_logits"], rebalanced, strict=True):
        z_t, z_s = z_t / s["temperature"], z_s / s["temperature"]
        p_s = np.exp(log_softmax(z_s))
        mass = np.array([p_s[group].sum() for group in groups])
        within = sum(kl(log_softmax(z_t[group]), log_softmax(z_s[group])) for group in groups)
        losses.append(s["alpha"] * kl(np.log(target), np.log(mass)) + s["beta"] * within)
    return float(s["temperature"] ** 2 * np.mean(losses))


def _pld(a: dict[str, Array], s: Settings) -> float:
    losses = []
    for z_s, z_t, y in zip(a["student_logits"], a["teacher_logits"], a["labels"], strict=True):
        confidence = np.exp(log_softmax(z_t / s["temperature"]))
        left = [int(y), *sorted((c for c in range(len(z_t)) if c != y), key=lambda c: -z_t[c])]
        loss = 0.0
        while left:
            loss -= confidence[left[0]] * log_softmax(z_s[left])[0]
            left = left[1:]
        losses.append(loss)
    return float(np.mean(losses))


def _rrd(a: dict[str, Array], s: Settings) -> float:
    pairs = list(zip(a["projected_features"], a["rectified_features"], strict=True))
    if s["form"] == "norm_aware":
        return float(np.mean([norm_and_direction(f, r) for f, r in pairs]))
    return float(np.mean([1 - f @ r / np.sqrt((f @ f) * (r @ r)) for f, r in pairs]))


def _lrd(a: dict[str, Array], s: Settings) -> float:
    temperature, losses = s["temperature"], []
    prior = np.log(a["class_counts"] / a["class_counts"].sum())
    shift = s["tau_prior"] * prior if s["space"] == "long_tailed" else 0.0
    for z_s, z_t, y in zip(a["student_logits"], a["rectified_logits"], a["labels"], strict=True):
        target = log_softmax((z_t + shift) / temperature)
        if s["weighting"] == "effective_number":
            target = class_weighted(target, a["class_counts"], s["beta"])
        gate = np.exp(log_softmax(z_t)[y]) if s["gate"] == "confidence" else 1.0
        losses.append(gate * temperature**2 * kl(target, log_softmax((z_s + shift) / temperature)))
    return float(np.mean(losses))


REFERENCES: dict[str, Callable[[dict[str, Array], Settings], float]] = {
    "cross_entropy": _cross_entropy,
    "balanced_softmax": _balanced_softmax,
    "class_balanced": _class_balanced,
    "focal": _focal,
    "ldam": _ldam,
    "kd": _kd,
    "dkd": _dkd,
    "bkd": _bkd,
    "ltkd": _ltkd,
    "dive": _dive,
    "cckd": _cckd,
    "nd": lambda a, _s: _rrd(a, {"form": "norm_aware"}),
    "pld": _pld,
    "knowledge_adjustment": _knowledge_adjustment,
    "rrd": _rrd,
    "lrd": _lrd,
}
