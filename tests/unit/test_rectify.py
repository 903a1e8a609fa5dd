"""Rectification: what it must leave alone, what it must guarantee, and a float64 reference for every form."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths.rectify import (
    Calibration,
    FeatureForm,
    Rectifier,
    balanced_means,
    class_gates,
    log_class_prior,
    rectify_features,
    rectify_logits,
)

NUM_CLASSES, NUM_DIMS, NUM_SAMPLES = 7, 9, 60
COUNTS = torch.tensor([500, 200, 80, 40, 20, 10, 5])
FORMS = [form for form in get_args(FeatureForm) if form != "off"]


def _calibration() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(NUM_CLASSES, NUM_DIMS, generator=generator) + 5
    return Calibration.from_means(means, COUNTS)


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(NUM_SAMPLES) % NUM_CLASSES
    noise = torch.randn(NUM_SAMPLES, NUM_DIMS, generator=generator)
    return _calibration().class_means[labels] + noise, labels


def _logits(num_classes: int = NUM_CLASSES, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (NUM_SAMPLES,), generator=generator)
    return 3 * torch.randn(NUM_SAMPLES, num_classes, generator=generator), labels


# ---- logits


@pytest.mark.parametrize("tau_prior", [0.0, 0.5, 1.0, 3.0])
def test_uniform_prior_leaves_targets_unchanged(tau_prior: float) -> None:
    z, y = _logits()
    prior = log_class_prior(torch.full((NUM_CLASSES,), 30))
    got = rectify_logits(z, y, prior, tau_prior=tau_prior, exchange=False)
    assert torch.allclose(got.softmax(dim=1), z.softmax(dim=1), atol=1e-6)


def test_taking_the_prior_off_a_posterior_leaves_the_likelihood() -> None:
    z, y = _logits()
    p = torch.softmax(z, dim=1).double().numpy() / (COUNTS / COUNTS.sum()).double().numpy()
    got = rectify_logits(z, y, log_class_prior(COUNTS), tau_prior=1.0, exchange=False)
    np.testing.assert_allclose(got.softmax(dim=1).numpy(), p / p.sum(axis=1, keepdims=True), atol=1e-5)


def test_plain_rectifier_passes_logits_through() -> None:
    z, y = _logits()
    spec = Rectifier()
    got = rectify_logits(
        z.half(), y, log_class_prior(COUNTS), tau_prior=spec.tau_prior, exchange=spec.exchange
    )
    assert got.dtype == torch.float32
    assert torch.equal(got, z.half().float())


@settings(max_examples=25, deadline=None)
@given(num_classes=st.integers(2, 12), tau_prior=st.floats(0, 3), seed=st.integers(0, 10**6))
def test_exchange_makes_the_label_win_by_permuting_values(
    num_classes: int, tau_prior: float, seed: int
) -> None:
    z, y = _logits(num_classes, seed)
    prior = log_class_prior(torch.arange(num_classes) * 11 + 3)
    plain = rectify_logits(z, y, prior, tau_prior=tau_prior, exchange=False)
    got = rectify_logits(z, y, prior, tau_prior=tau_prior, exchange=True)
    assert torch.equal(got.argmax(dim=1), y)
    assert torch.equal(got.sort(dim=1).values, plain.sort(dim=1).values)
    right = plain.argmax(dim=1) == y
    assert torch.equal(got[right], plain[right])
    assert ((got != plain).sum(dim=1)[~right] == 2).all()


def test_exchange_leaves_a_tie_alone() -> None:
    z = torch.tensor([[4.0, 1.0, 4.0]])
    for label in (0, 2):
        got = rectify_logits(z, torch.tensor([label]), torch.zeros(3), tau_prior=0.0, exchange=True)
        assert torch.equal(got, z)


def test_exchange_is_decided_after_the_prior() -> None:
    z, y = torch.tensor([[2.0, 1.5]]), torch.tensor([1])  # wrong as it is, right once the prior is off
    prior = log_class_prior(torch.tensor([90, 10]))
    plain = rectify_logits(z, y, prior, tau_prior=1.0, exchange=False)
    assert torch.equal(rectify_logits(z, y, prior, tau_prior=1.0, exchange=True), plain)


def test_inputs_stay_as_they_were() -> None:
    z, y = _logits()
    before = z.clone()
    rectify_logits(z, y, log_class_prior(COUNTS), tau_prior=1.0, exchange=True)
    rectify_logits(z, y, log_class_prior(COUNTS), tau_prior=0.0, exchange=True)
    assert torch.equal(z, before)


# ---- gates


def test_by_count_gate_grows_as_classes_get_rarer() -> None:
    gate = class_gates(COUNTS, Rectifier(gate="by_count", gate_strength=0.8))
    assert (gate.diff() > 0).all()
    assert gate[0] == 0
    assert gate[-1] == pytest.approx(0.8)
    assert gate[3] == pytest.approx(0.8 * np.log(500 / 40) / np.log(500 / 5))


def test_gates_without_counts() -> None:
    assert (class_gates(COUNTS, Rectifier(gate="full", gate_strength=0.3)) == 1).all()
    assert torch.allclose(
        class_gates(COUNTS, Rectifier(gate="constant", gate_strength=0.3)), torch.tensor(0.3)
    )


def test_by_count_gate_of_equal_counts_is_the_full_strength() -> None:
    gate = class_gates(torch.full((4,), 9), Rectifier(gate="by_count", gate_strength=0.4))
    assert torch.allclose(gate, torch.tensor(0.4))


# ---- features


def _reference(form: str, gate: np.ndarray) -> np.ndarray:
    """One sample at a time, float64."""
    calibration, (features, labels) = _calibration(), _features()
    raw, u = calibration.class_means.double().numpy(), calibration.priors.double().numpy()
    centre = sum(raw) / NUM_CLASSES
    mean_norm = np.mean([np.sqrt(((mean - centre) ** 2).sum()) for mean in raw])
    rows = []
    for f_raw, y in zip(features.double().numpy(), labels.tolist(), strict=True):
        f, mu, g = f_raw - centre, raw[y] - centre, gate[y]
        vector = {
            "teacher": f,
            "balanced": (1 - g) * mu + g * mean_norm * u[y] + f - mu,
            "class_mean": mu,
            "prior": u[y],
            "mix": (1 - g) * f / np.linalg.norm(f) + g * u[y],
        }[form]
        rows.append(vector / np.linalg.norm(vector))
    return np.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["full", "constant", "by_count"])
def test_every_form_equals_the_reference_and_has_unit_length(form: Any, gate: Any) -> None:
    spec = Rectifier(features=form, gate=gate, gate_strength=0.6)
    rarity = (np.log(500) - np.log(COUNTS.double().numpy())) / np.log(100)
    want = {"full": np.ones(7), "constant": np.full(7, 0.6), "by_count": 0.6 * rarity}[gate]
    features, labels = _features()
    got = rectify_features(features, labels, _calibration(), spec)
    assert got.dtype == torch.float32
    assert (got.norm(dim=1) - 1).abs().max() < 1e-5
    np.testing.assert_allclose(got.numpy(), _reference(form, want), atol=2e-6)


@pytest.mark.parametrize("form", ["balanced", "mix"])
def test_closed_gate_is_the_teacher_itself(form: Any) -> None:
    features, labels = _features()
    closed = Rectifier(features=form, gate="constant", gate_strength=0.0)
    got = rectify_features(features, labels, _calibration(), closed)
    teacher = rectify_features(features, labels, _calibration(), Rectifier(features="teacher"))
    assert torch.allclose(got, teacher, atol=1e-6)


def test_class_means_move_to_their_balanced_places() -> None:
    calibration = _calibration()
    spec = Rectifier(features="balanced", gate="by_count")
    got = rectify_features(calibration.class_means, torch.arange(NUM_CLASSES), calibration, spec)
    want = balanced_means(calibration, spec)
    assert torch.allclose(got, want / want.norm(dim=1, keepdim=True), atol=1e-5)
    full = balanced_means(calibration, Rectifier(features="balanced"))
    assert torch.allclose(full, calibration.mean_norm * calibration.priors, atol=1e-5)
    assert torch.allclose(want[0], (calibration.class_means - calibration.centre)[0], atol=1e-5)  # head stays


def test_full_gate_makes_every_pair_of_classes_equally_far() -> None:
    places = balanced_means(_calibration(), Rectifier(features="balanced")).double()
    gaps = torch.pdist(places)
    assert (gaps - gaps.mean()).abs().max() < 1e-4 * gaps.mean()


def test_what_varies_within_a_class_stays() -> None:
    calibration, label = _calibration(), torch.tensor([6, 6])
    offset = torch.zeros(2, NUM_DIMS)
    offset[0, 0], offset[1, 0] = 1e-3, -1e-3
    spec = Rectifier(features="balanced")
    got = rectify_features(calibration.class_means[label] + offset, label, calibration, spec)
    place = balanced_means(calibration, spec)[6]
    want = [(place + o) / (place + o).norm() for o in offset]
    assert torch.allclose(got, torch.stack(want), atol=1e-6)
    assert not torch.equal(got[0], got[1])


def test_half_precision_features_are_accepted() -> None:
    features, labels = _features()
    for form in FORMS:
        spec = Rectifier(features=form)
        half = rectify_features(features.half(), labels, _calibration(), spec)
        assert torch.allclose(half, rectify_features(features, labels, _calibration(), spec), atol=5e-3)


# ---- calibration


def test_calibration_survives_its_dictionary() -> None:
    before = _calibration()
    after = Calibration.from_dict(before.to_dict())
    for field in dataclasses.fields(Calibration):
        assert torch.equal(getattr(after, field.name), getattr(before, field.name)), field.name


def test_calibration_weighs_every_class_the_same() -> None:
    calibration = _calibration()
    assert torch.allclose(calibration.centre, calibration.class_means.mean(dim=0))
    other = Calibration.from_means(calibration.class_means, COUNTS.flip(0))
    assert torch.equal(other.priors, calibration.priors)


def test_unusable_calibrations_are_refused() -> None:
    means = _calibration().class_means
    with pytest.raises(DataError, match="first: class 2"):
        Calibration.from_means(means, torch.tensor([3, 1, 0, 1, 0, 1, 1]))
    with pytest.raises(ShapeError, match=r"\(7, 9\).*\(6,\)"):
        Calibration.from_means(means, COUNTS[:6])
    with pytest.raises(DataError, match="lacks priors"):
        Calibration.from_dict({"class_means": means, "class_counts": COUNTS})
    with pytest.raises(ShapeError, match="priors"):
        Calibration.from_dict({"class_means": means, "class_counts": COUNTS, "priors": means[:, :4]})


# ---- spec and shapes


def test_equal_specs_are_one_key() -> None:
    assert Rectifier() == Rectifier(tau_prior=0.0, exchange=False)
    cache = {Rectifier(tau_prior=1.0): "a", Rectifier(exchange=True): "b"}
    assert cache[Rectifier(tau_prior=1.0)] == "a"
    assert Rectifier() not in cache


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau_prior", -1.0),
        ("tau_prior", float("nan")),
        ("features", "raw"),
        ("gate", "log"),
        ("gate_strength", 1.5),
        ("send_logits", False),
    ],
)
def test_rectifier_out_of_range_names_its_path(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"rectifier\.{name}"):
        Rectifier(**{name: value})


def test_wrong_shapes_are_refused_with_all_of_them() -> None:
    (z, y), (features, labels) = _logits(), _features()
    with pytest.raises(ShapeError, match=r"\(60, 7\).*\(60,\).*\(6,\)"):
        rectify_logits(z, y, torch.zeros(6), tau_prior=1.0, exchange=False)
    with pytest.raises(ShapeError, match=r"\(60, 7\).*\(59,\)"):
        rectify_logits(z, y[:59], torch.zeros(7), tau_prior=1.0, exchange=False)
    with pytest.raises(ShapeError, match=r"\(60, 8\).*\(7, 9\)"):
        rectify_features(features[:, :8], labels, _calibration(), Rectifier(features="teacher"))
    with pytest.raises(ConfigError, match=r"features is off"):
        rectify_features(features, labels, _calibration(), Rectifier())
