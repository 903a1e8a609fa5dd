"""Answers whether a student minimises what its config says: terms, weights, settings, and which targets it asks for.

Does not check the terms' formulas (`test_losses*` do).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from krd_ray.config_loss import ClassificationConfig, LossConfig
from krd_ray.maths.classification import effective_number_weights
from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS
from krd_ray.maths.rectify import Rectifier
from krd_ray.train.objective import StepTargets, class_weights_at, objective_terms, rectifier_for

B, C, D = 6, 5, 8
COUNTS = torch.tensor([50, 20, 9, 4, 1])


def loss_config(**parts: Any) -> LossConfig:
    return LossConfig.model_validate(parts)


def inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "student_logits": normal(B, C),
        "projected": normal(B, D),
        "labels": torch.randint(0, C, (B,), generator=generator),
        "class_counts": COUNTS,
        "class_weights": torch.ones(C),
        "targets": StepTargets(normal(B, C), normal(B, D)),
    }


def log_softmax(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_loss_is_the_weighted_sum_of_its_terms_by_hand() -> None:
    given = inputs()
    z_s, labels, f_s = (given[key].double().numpy() for key in ("student_logits", "labels", "projected"))
    z_t, f_t = given["targets"].logits.double().numpy(), given["targets"].features.double().numpy()
    loss = loss_config(
        classification={"name": "balanced_softmax", "weight": 0.5},
        rrd={"weight": 2.0},
        lrd={"weight": 0.25, "temperature": 3.0},
    )
    terms = objective_terms(loss, **given)
    prior = np.log(COUNTS.double().numpy())
    classification = -log_softmax(z_s + prior)[np.arange(B), labels.astype(int)].mean()
    log_t, log_s = log_softmax(z_t / 3), log_softmax(z_s / 3)
    lrd = 9 * (np.exp(log_t) * (log_t - log_s)).sum(axis=1).mean()
    rrd = (1 - (f_s * f_t).sum(axis=1) / np.linalg.norm(f_s, axis=1) / np.linalg.norm(f_t, axis=1)).mean()
    expected = {"classification": classification, "rrd": rrd, "lrd": lrd}
    expected["loss"] = 0.5 * classification + 2 * rrd + 0.25 * lrd
    assert set(terms) == set(expected)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name


def test_plain_distillation_and_no_teacher_have_only_their_own_terms() -> None:
    given: dict[str, Any] = {
        "student_logits": torch.tensor([[1.0, 0.0]]),
        "projected": None,
        "labels": torch.tensor([0]),
        "class_counts": torch.tensor([3, 1]),
        "class_weights": torch.ones(2),
    }
    alone = objective_terms(loss_config(), **given, targets=None)
    assert set(alone) == {"loss", "classification"}
    assert alone["loss"].item() == pytest.approx(math.log(1 + math.exp(-1)))
    targets = StepTargets(torch.tensor([[1.0, 0.0]]), None)
    taught = objective_terms(loss_config(kd={"weight": 5.0}), **given, targets=targets)
    assert set(taught) == {"loss", "classification", "kd"}
    assert taught["kd"].item() == pytest.approx(0.0, abs=1e-7), "student and teacher agree"


@pytest.mark.parametrize("name", DISTILLATION_TERMS)
def test_every_term_is_switched_on_by_its_weight_and_enters_the_sum_with_it(name: str) -> None:
    given = inputs()
    alone = objective_terms(loss_config(), **given)
    loss = loss_config(**{name: {"weight": 3.0}})
    terms = objective_terms(loss, **given)
    assert loss.active_terms == [name]
    assert set(terms) == {"loss", "classification", name}
    assert terms["loss"].item() == pytest.approx((alone["classification"] + 3 * terms[name]).item(), rel=1e-6)


@pytest.mark.parametrize("name", DISTILLATION_TERMS)
def test_every_setting_of_a_term_reaches_it(name: str) -> None:
    given, changed = inputs(), {"temperature": 1.7, "alpha": 0.3, "beta": 0.5, "power": 0.7, "tau_prior": 0.4}
    changed |= {
        "space": "long_tailed",
        "weighting": "effective_number",
        "gate": "confidence",
        "form": "norm_aware",
    }
    for setting in DISTILLATION_TERMS[name].params:
        base: dict[str, Any] = {"weight": 1.0}
        if name == "lrd" and setting == "tau_prior":
            base["space"] = "long_tailed"  # in the other space the teacher has taken it off already
        if name == "lrd" and setting == "beta":
            base["weighting"] = "effective_number"
        plain = objective_terms(loss_config(**{name: base}), **given)[name]
        other = objective_terms(loss_config(**{name: {**base, setting: changed[setting]}}), **given)[name]
        assert plain.item() != other.item(), setting


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_every_classification_loss_runs_from_its_name(name: str) -> None:
    terms = objective_terms(loss_config(classification={"name": name, "weight": 2.0}), **inputs())
    assert terms["loss"].item() == pytest.approx(2 * terms["classification"].item(), rel=1e-6)


def test_classes_weigh_by_effective_number_from_the_epoch_on() -> None:
    config = ClassificationConfig(reweight_from_epoch=3, beta=0.99)
    assert torch.equal(class_weights_at(config, COUNTS, 2), torch.ones(C))
    assert torch.equal(class_weights_at(config, COUNTS, 3), effective_number_weights(COUNTS, 0.99))
    assert torch.equal(class_weights_at(ClassificationConfig(), COUNTS, 99), torch.ones(C))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, None),
        ({"kd": {"weight": 1}}, Rectifier(tau_prior=0.0, exchange=False, features="off", send_logits=True)),
        ({"lrd": {"weight": 1, "tau_prior": 0.5, "exchange": True}}, Rectifier(tau_prior=0.5, exchange=True)),
        ({"lrd": {"weight": 1, "exchange": False, "tau_prior": 1}}, Rectifier(tau_prior=1.0)),
        ({"rrd": {"weight": 1}}, Rectifier(features="teacher", send_logits=False)),
        (
            {"rrd": {"weight": 1, "target": "balanced", "form": "norm_aware", "prior": "sphere"}},
            Rectifier(features="balanced", prior="sphere", length="teacher", send_logits=False),
        ),
        (
            {"nd": {"weight": 1}, "dkd": {"weight": 1}},
            Rectifier(features="class_direction", length="teacher", send_logits=True),
        ),
        (
            {
                "rrd": {"weight": 1, "target": "mix", "gate": "by_count", "gate_strength": 0.5},
                "kd": {"weight": 1},
            },
            Rectifier(features="mix", gate="by_count", gate_strength=0.5),
        ),
    ],
)
def test_objective_asks_for_exactly_the_targets_it_uses(
    parts: dict[str, Any], expected: Rectifier | None
) -> None:
    assert rectifier_for(loss_config(**parts)) == expected


def test_temperatures_do_not_change_what_is_asked_for() -> None:
    forms = {
        rectifier_for(loss_config(lrd={"weight": w, "temperature": t})) for w in (0.1, 2) for t in (1, 4)
    }
    assert len(forms) == 1


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"kd": {"weight": 1}, "lrd": {"weight": 1}}, "kd and lrd ask for the teacher's logits in two forms"),
        ({"pld": {"weight": 1}, "lrd": {"weight": 1}}, "pld and lrd"),
        (
            {"nd": {"weight": 1}, "rrd": {"weight": 1}},
            "nd and rrd ask for the teacher's features in two forms",
        ),
        (
            {"classification": {"name": "class_balanced", "reweight_from_epoch": 3}},
            "class_balanced weighs classes from the first epoch",
        ),
    ],
)
def test_terms_that_contradict_each_other_are_refused(parts: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        loss_config(**parts)


def test_label_names_what_is_on() -> None:
    parts = {"rrd": {"weight": 1}, "lrd": {"weight": 1}, "classification": {"name": "focal"}}
    assert loss_config(**parts).label() == "focal+rrd+lrd"
    assert loss_config().label() == "cross_entropy"
