"""Rectification: what it must leave alone, what it must guarantee, and a float64 reference for every form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch import Tensor

from krd_ray.errors import ConfigError, ShapeError, TeacherError
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.priors import PriorKind
from krd_ray.maths.rectify import (
    FeatureForm,
    Length,
    Rectifier,
    balanced_means,
    class_gates,
    log_class_prior,
    rectify_features,
    rectify_logits,
    to_float16,
)

NUM_CLASSES, NUM_DIMS, NUM_SAMPLES = 7, 9, 60
COUNTS = torch.tensor([500, 200, 80, 40, 20, 10, 5])
FORMS = [form for form in get_args(FeatureForm) if form != "off"]
PRIORS, LENGTHS = get_args(PriorKind), get_args(Length)


@functools.cache
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


def _reference_priors(kind: str, centred: np.ndarray) -> np.ndarray:
    """float64; the simplex by eigenvalues, U = sqrt(C / (C - 1)) (M M^T)^(-1/2) M on the complement of 1."""
    if kind == "class_mean":
        return centred / np.sqrt((centred**2).sum(axis=1, keepdims=True))
    if kind == "sphere":  # a search, not a formula: tests of the priors say what it must be
        return _calibration().priors_of("sphere").double().numpy()
    squared, vectors = np.linalg.eigh(centred @ centred.T)
    inverse_root = (vectors[:, 1:] / np.sqrt(squared[1:])) @ vectors[:, 1:].T
    return np.sqrt(NUM_CLASSES / (NUM_CLASSES - 1)) * inverse_root @ centred


def _reference(spec: Rectifier, gate: np.ndarray) -> np.ndarray:
    """One sample at a time, float64."""
    features, labels = _features()
    raw = _calibration().class_means.double().numpy()
    centre = sum(raw) / NUM_CLASSES
    u = _reference_priors(spec.prior, raw - centre)
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
            "class_direction": raw[y],
        }[spec.features]
        made_from = f_raw if spec.features == "class_direction" else f
        length = {"unit": 1.0, "teacher": np.linalg.norm(made_from)}[spec.length]
        rows.append(length * vector / np.linalg.norm(vector))
    return np.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gate", ["full", "constant", "by_count"])
def test_every_form_equals_the_reference(form: Any, prior: Any, length: Any, gate: Any) -> None:
    spec = Rectifier(features=form, prior=prior, length=length, gate=gate, gate_strength=0.6)
    rarity = (np.log(500) - np.log(COUNTS.double().numpy())) / np.log(100)
    want_gate = {"full": np.ones(7), "constant": np.full(7, 0.6), "by_count": 0.6 * rarity}[gate]
    features, labels = _features()
    got, want = rectify_features(features, labels, _calibration(), spec), _reference(spec, want_gate)
    assert got.dtype == torch.float32
    scale = np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(got.numpy() / scale, want / scale, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prior", PRIORS)
def test_lengths_are_one_or_the_teachers(form: Any, prior: Any) -> None:
    (features, labels), calibration = _features(), _calibration()
    unit = rectify_features(features, labels, calibration, Rectifier(features=form, prior=prior))
    assert (unit.norm(dim=1) - 1).abs().max() < 1e-5
    spec = Rectifier(features=form, prior=prior, length="teacher")
    full = rectify_features(features, labels, calibration, spec)
    made_from = features if form == "class_direction" else features - calibration.centre
    assert torch.allclose(full.norm(dim=1), made_from.norm(dim=1), rtol=1e-5)
    assert torch.allclose(full / full.norm(dim=1, keepdim=True), unit, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prior", ["auto", "simplex", "class_mean"])
@pytest.mark.parametrize("length", LENGTHS)
def test_rotating_the_teacher_rotates_its_targets(form: Any, prior: Any, length: Any) -> None:
    (features, labels), calibration = _features(), _calibration()
    rotation = torch.from_numpy(ortho_group.rvs(NUM_DIMS, random_state=4)).float()
    rotated = Calibration.from_means(calibration.class_means @ rotation, COUNTS)
    spec = Rectifier(features=form, prior=prior, length=length, gate="by_count")
    want = rectify_features(features, labels, calibration, spec) @ rotation
    got = rectify_features(features @ rotation, labels, rotated, spec)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["balanced", "mix"])
def test_closed_gate_is_the_teacher_itself(form: Any, prior: Any, length: Any) -> None:
    features, labels = _features()
    closed = Rectifier(features=form, prior=prior, length=length, gate="constant", gate_strength=0.0)
    got = rectify_features(features, labels, _calibration(), closed)
    teacher = Rectifier(features="teacher", length=length)
    want = rectify_features(features, labels, _calibration(), teacher)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def test_head_class_keeps_the_teachers_features_under_a_gate_by_count() -> None:
    (features, labels), calibration = _features(), _calibration()
    spec = Rectifier(features="balanced", gate="by_count")
    got = rectify_features(features, labels, calibration, spec)
    teacher = rectify_features(features, labels, calibration, Rectifier(features="teacher"))
    assert torch.equal(got[labels == 0], teacher[labels == 0])
    assert not torch.allclose(got[labels == 6], teacher[labels == 6], atol=1e-2)


def test_class_means_move_to_their_balanced_places() -> None:
    calibration = _calibration()
    spec = Rectifier(features="balanced", gate="by_count")
    got = rectify_features(calibration.class_means, torch.arange(NUM_CLASSES), calibration, spec)
    want = balanced_means(calibration, spec, torch.arange(NUM_CLASSES))
    assert torch.allclose(got, want / want.norm(dim=1, keepdim=True), atol=1e-5)
    full = balanced_means(calibration, Rectifier(features="balanced"), torch.arange(NUM_CLASSES))
    assert torch.allclose(full, calibration.mean_norm * calibration.priors, atol=1e-5)
    assert torch.equal(balanced_means(calibration, spec, torch.tensor([4, 0, 4])), want[[4, 0, 4]])
    assert torch.equal(want[0], (calibration.class_means - calibration.centre)[0])  # head stays


def test_full_gate_makes_every_pair_of_classes_equally_far() -> None:
    places = balanced_means(_calibration(), Rectifier(features="balanced"), torch.arange(NUM_CLASSES))
    gaps = torch.pdist(places.double())
    assert (gaps - gaps.mean()).abs().max() < 1e-4 * gaps.mean()


def test_class_mean_prior_makes_norms_equal_and_keeps_the_teachers_angles() -> None:
    calibration = _calibration()
    centred = calibration.class_means - calibration.centre
    assert centred.norm(dim=1).max() > 1.2 * centred.norm(dim=1).min()
    spec = Rectifier(features="balanced", prior="class_mean")
    places = balanced_means(calibration, spec, torch.arange(NUM_CLASSES))
    assert torch.allclose(places.norm(dim=1), calibration.mean_norm.expand(NUM_CLASSES), rtol=1e-5)
    unit = places / places.norm(dim=1, keepdim=True)
    assert torch.allclose(unit, centred / centred.norm(dim=1, keepdim=True), atol=1e-6)


def test_what_varies_within_a_class_stays() -> None:
    calibration, label = _calibration(), torch.tensor([6, 6])
    offset = torch.zeros(2, NUM_DIMS)
    offset[0, 0], offset[1, 0] = 1e-3, -1e-3
    spec = Rectifier(features="balanced")
    got = rectify_features(calibration.class_means[label] + offset, label, calibration, spec)
    place = balanced_means(calibration, spec, label[:1])[0]
    want = [(place + o) / (place + o).norm() for o in offset]
    assert torch.allclose(got, torch.stack(want), atol=1e-6)
    assert not torch.equal(got[0], got[1])


def test_half_precision_features_are_accepted() -> None:
    features, labels = _features()
    for form in FORMS:
        spec = Rectifier(features=form)
        half = rectify_features(features.half(), labels, _calibration(), spec)
        assert torch.allclose(half, rectify_features(features, labels, _calibration(), spec), atol=5e-3)


# ---- on the wire


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_direction_and_length_survive_float16(form: Any, length: Any, scale: float) -> None:
    features, labels = _features()
    calibration = Calibration.from_means(scale * _calibration().class_means, COUNTS)
    spec = Rectifier(features=form, length=length)
    exact = rectify_features(scale * features, labels, calibration, spec)
    sent = to_float16(exact, np.arange(NUM_SAMPLES), "features", "").float()
    assert torch.allclose(sent.norm(dim=1), exact.norm(dim=1), rtol=1e-3)
    assert (F.cosine_similarity(sent, exact) > 1 - 1e-6).all()


def test_a_length_beyond_float16_is_refused_and_named() -> None:
    features, labels = _features()
    features[17] = 0.0
    features[17, 3] = 65504.0  # the largest float16 itself, but 40 longer without the centre
    centre = _calibration().centre.clone()
    centre[3] = -40.0
    calibration = dataclasses.replace(_calibration(), centre=centre)
    spec = Rectifier(features="teacher", length="teacher")
    long = rectify_features(features, labels, calibration, spec)
    with pytest.raises(TeacherError, match=r"features of sample 117 have length 65544\..*65504\. Ask less\."):
        to_float16(long, np.arange(100, 160), "features", "Ask less.")
    unit = rectify_features(features, labels, calibration, Rectifier(features="teacher"))
    assert to_float16(unit, np.arange(100, 160), "features", "Ask less.").isfinite().all()


@pytest.mark.parametrize("value", [65519.9, -65519.9, 65504.0])
def test_what_rounds_to_the_largest_float16_is_sent(value: float) -> None:
    sent = to_float16(torch.tensor([[0.5, value]]), np.array([1]), "logits", "")
    assert sent.tolist() == [[0.5, np.sign(value) * 65504.0]]
    assert sent.dtype == torch.float16
    assert to_float16(torch.zeros(0, 4), np.zeros(0, np.int64), "logits", "").shape == (0, 4)


@pytest.mark.parametrize("value", [65520.0, -7e4, float("nan")])
def test_what_float16_cannot_hold_is_never_sent(value: float) -> None:
    rows = torch.zeros(3, 4)
    rows[1, 2] = value
    with pytest.raises(TeacherError, match="logits of sample 8 "):
        to_float16(rows, np.array([9, 8, 7]), "logits", "")


# ---- spec and shapes


def test_equal_specs_are_one_key() -> None:
    assert Rectifier() == Rectifier(tau_prior=0.0, exchange=False)
    cache = {Rectifier(tau_prior=1.0): "a", Rectifier(exchange=True): "b"}
    assert cache[Rectifier(tau_prior=1.0)] == "a"
    assert Rectifier() not in cache
    assert len({Rectifier(features="prior", prior=p, length=n) for p in PRIORS for n in LENGTHS}) == 8
    with pytest.raises(AttributeError):
        Rectifier().prior = "sphere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau_prior", -1.0),
        ("tau_prior", float("nan")),
        ("features", "raw"),
        ("gate", "log"),
        ("prior", "etf"),
        ("length", 2.0),
        ("gate_strength", 1.5),
        ("send_logits", False),
    ],
)
def test_rectifier_out_of_range_names_its_path(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"rectifier\.{name}"):
        Rectifier(**{name: value})


def test_priors_that_do_not_fit_are_refused_by_the_forms_that_need_them() -> None:
    calibration = Calibration.from_means(_calibration().class_means[:, :5], COUNTS)
    features, labels = _features()
    for form in FORMS:
        spec = Rectifier(features=form, prior="simplex")
        if form in ("balanced", "prior", "mix"):
            with pytest.raises(ConfigError, match="at least 6 feature dimensions, and this teacher has 5"):
                rectify_features(features[:, :5], labels, calibration, spec)
        else:
            assert rectify_features(features[:, :5], labels, calibration, spec).shape == (NUM_SAMPLES, 5)


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
