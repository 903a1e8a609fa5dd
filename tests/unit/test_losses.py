"""Losses: one conformance suite over both registries, and each formula against float64 NumPy."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from krd_ray.errors import ConfigError, ShapeError
from krd_ray.maths.losses import (
    CLASSIFICATION_LOSSES,
    DISTILLATION_TERMS,
    NEEDS,
    LossRecord,
    balanced_softmax,
    cross_entropy,
    kd_kl,
    rrd_cosine,
)

B, C, D = 6, 5, 8
RECORDS = CLASSIFICATION_LOSSES | DISTILLATION_TERMS
STUDENT = ("student_logits", "projected_features")
PER_SAMPLE = (*STUDENT, "labels", "teacher_logits", "rectified_features")
every_loss = pytest.mark.parametrize("name", RECORDS)


def _inputs(scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "student_logits": scale * torch.randn(B, C, generator=generator),
        "teacher_logits": scale * torch.randn(B, C, generator=generator),
        "projected_features": scale * torch.randn(B, D, generator=generator),
        "rectified_features": scale * torch.randn(B, D, generator=generator),
        "labels": torch.randint(0, C, (B,), generator=generator),
        "class_counts": torch.tensor([400, 100, 30, 10, 3]),
        "temperature": 2.5,
    }


def _call(record: LossRecord, inputs: dict[str, Any]) -> Tensor:
    """By parameter name; an unknown name fails, so each new loss has to join the suite."""
    return record.fn(**{name: inputs[name] for name in inspect.signature(record.fn).parameters})


def _student_names(name: str) -> list[str]:
    return [parameter for parameter in inspect.signature(RECORDS[name].fn).parameters if parameter in STUDENT]


# ---- independent float64 formulas: name -> value from NumPy arrays


def _np_softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _np_cross_entropy(a: dict[str, Any], z: np.ndarray) -> float:
    return float(-np.mean([np.log(_np_softmax(z)[i, y]) for i, y in enumerate(a["labels"])]))


def _np_balanced(a: dict[str, Any], z: np.ndarray) -> float:
    weighted = a["class_counts"] * np.exp(z - z.max(axis=1, keepdims=True))
    return float(-np.mean([np.log(row[y] / row.sum()) for row, y in zip(weighted, a["labels"], strict=True)]))


def _np_kd(a: dict[str, Any], z: np.ndarray) -> float:
    p, q = _np_softmax(a["teacher_logits"] / 2.5), _np_softmax(z / 2.5)
    return float(2.5**2 * np.mean(np.sum(p * np.log(p / q), axis=1)))


def _np_rrd(a: dict[str, Any], f: np.ndarray) -> float:
    pairs = zip(f, a["rectified_features"], strict=True)
    return float(np.mean([1 - x @ r / np.sqrt((x @ x) * (r @ r)) for x, r in pairs]))


REFERENCES = {
    "cross_entropy": _np_cross_entropy,
    "balanced_softmax": _np_balanced,
    "kd": _np_kd,
    "lrd": _np_kd,
    "rrd": _np_rrd,
}


@every_loss
def test_value_and_gradient_equal_the_float64_formula(name: str) -> None:
    inputs = _inputs()
    (student_name,) = _student_names(name)
    student = inputs[student_name].requires_grad_()
    loss = _call(RECORDS[name], inputs)
    loss.backward()
    arrays = {
        key: value.detach().double().numpy() if value.is_floating_point() else value.numpy()
        for key, value in inputs.items()
        if isinstance(value, Tensor)
    }
    x, formula = arrays[student_name], REFERENCES[name]
    assert loss.item() == pytest.approx(formula(arrays, x), rel=1e-5)
    numeric = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        numeric[index] = (formula(arrays, x + step) - formula(arrays, x - step)) / 2e-5
    np.testing.assert_allclose(student.grad.numpy(), numeric, atol=2e-6)


# ---- conformance


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_loss_is_a_float32_scalar_for_any_float_input(name: str, dtype: torch.dtype) -> None:
    inputs = _inputs()
    cast = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    loss = _call(RECORDS[name], cast)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_call(RECORDS[name], inputs).item(), rel=0.05)


@every_loss
@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_loss_and_gradient_are_finite_for_extreme_inputs(name: str, scale: float) -> None:
    inputs = _inputs(scale)
    (student_name,) = _student_names(name)
    inputs[student_name].requires_grad_()
    loss = _call(RECORDS[name], inputs)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(inputs[student_name].grad).all()


@every_loss
def test_gradient_reaches_the_student_and_nobody_else(name: str) -> None:
    inputs = _inputs()
    for value in inputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    _call(RECORDS[name], inputs).backward()
    for key, value in inputs.items():
        if key in _student_names(name):
            assert value.grad.abs().sum() > 0
        elif isinstance(value, Tensor):
            assert value.grad is None, key


@every_loss
def test_loss_is_a_mean_over_the_batch_in_any_order(name: str) -> None:
    inputs = _inputs()
    once = _call(RECORDS[name], inputs)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = {key: value[order] if key in PER_SAMPLE else value for key, value in inputs.items()}
    twice = {
        key: value.repeat_interleave(2, 0) if key in PER_SAMPLE else value for key, value in inputs.items()
    }
    assert _call(RECORDS[name], shuffled).item() == pytest.approx(once.item(), rel=1e-6)
    assert _call(RECORDS[name], twice).item() == pytest.approx(once.item(), rel=1e-6)
    alone = [
        _call(RECORDS[name], {k: v[i : i + 1] if k in PER_SAMPLE else v for k, v in inputs.items()}).item()
        for i in range(B)
    ]
    assert np.mean(alone) == pytest.approx(once.item(), rel=1e-5)


@every_loss
def test_batch_mismatch_names_both_shapes(name: str) -> None:
    (student_name,) = _student_names(name)
    inputs = _inputs()
    inputs[student_name] = inputs[student_name][:4]
    with pytest.raises(ShapeError, match=r"\(4, \d\).*\(6(,|, \d)\)"):
        _call(RECORDS[name], inputs)


@every_loss
def test_record_says_what_it_needs_and_where_it_comes_from(name: str) -> None:
    record = RECORDS[name]
    assert record.needs <= NEEDS
    assert record.source
    parameters = set(inspect.signature(record.fn).parameters)
    assert ("class_counts" in record.needs) == ("class_counts" in parameters)
    assert bool({"teacher_logits", "rectified_logits"} & record.needs) == ("teacher_logits" in parameters)
    assert ("rectified_features" in record.needs) == ("rectified_features" in parameters)


def test_every_registered_loss_has_a_reference() -> None:
    assert set(RECORDS) == set(REFERENCES)
    assert not set(CLASSIFICATION_LOSSES) & set(DISTILLATION_TERMS)


# ---- what each loss promises


def test_kl_is_zero_where_student_equals_teacher_and_positive_elsewhere() -> None:
    z = _inputs()["teacher_logits"]
    assert kd_kl(z + 3, z, temperature=4.0).abs() < 1e-6
    assert kd_kl(z * 1.1, z, temperature=4.0) > 1e-5


def test_kl_gradient_scale_does_not_depend_on_the_temperature() -> None:
    inputs, norms = _inputs(0.01), []
    for temperature in (5.0, 50.0):
        z = inputs["student_logits"].clone().requires_grad_()
        kd_kl(z, inputs["teacher_logits"], temperature=temperature).backward()
        norms.append(z.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range_is_refused(temperature: float) -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=r"temperature must be > 0"):
        kd_kl(z, z, temperature=temperature)


def test_equal_counts_make_balanced_softmax_cross_entropy() -> None:
    inputs = _inputs()
    got = balanced_softmax(inputs["student_logits"], inputs["labels"], torch.full((C,), 77))
    assert got.item() == pytest.approx(
        cross_entropy(inputs["student_logits"], inputs["labels"]).item(), rel=1e-6
    )


def test_class_counts_of_another_dataset_are_refused() -> None:
    inputs = _inputs()
    with pytest.raises(ShapeError, match=r"\(4,\).*\(6, 5\)"):
        balanced_softmax(inputs["student_logits"], inputs["labels"], torch.ones(4))


def test_cosine_ignores_length_and_spans_zero_to_two() -> None:
    f = _inputs()["projected_features"]
    assert rrd_cosine(3 * f, 0.1 * f).abs() < 1e-6
    assert rrd_cosine(f, -f).item() == pytest.approx(2.0)
