"""Every loss and its gradient against plain float64 formulas, in every dtype, at every shape and at the extremes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.unit.loss_references import (
    CASES,
    RECORDS,
    REFERENCES,
    SETTINGS,
    Settings,
    arrays_of,
    call,
    case_id,
    draw,
    student_of,
)

SHAPES = [(1, 3, 1.0), (5, 4, 5.0), (8, 10, 0.3), (3, 100, 2.0)]  # batch, classes, spread of the logits
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tolerance(settings: Settings) -> float:
    """Float32 rounding of a sum of logarithms of size about 10, times the T^2 in front of it."""
    return 1e-6 * max(1.0, settings.get("temperature", 1.0)) ** 2 * max(1.0, settings.get("beta", 1.0))


def test_every_registered_loss_has_a_formula_and_settings() -> None:
    assert set(RECORDS) == set(REFERENCES) == set(SETTINGS)
    assert len(RECORDS) == 16


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_value_equals_the_float64_formula(name: str, settings: Settings, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        tensors = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in draw(seed, *shape).items()
        }
        expected = REFERENCES[name](arrays_of(tensors), settings)
        got = call(name, tensors, settings).item()
        assert got == pytest.approx(expected, rel=1e-5, abs=tolerance(settings)), shape


@every_case
def test_value_equals_the_float64_formula_where_logits_are_extreme(name: str, settings: Settings) -> None:
    for seed in range(3):
        tensors = draw(seed, 8, 9)
        for key, value in tensors.items():
            if key.endswith("_logits"):
                tensors[key] = 50.0 * value.sign() + value
        expected = REFERENCES[name](arrays_of(tensors), settings)
        got = call(name, tensors, settings).item()
        assert np.isfinite(expected)
        assert got == pytest.approx(expected, rel=1e-5, abs=tolerance(settings))


@pytest.mark.parametrize(
    ("name", "settings"), [case for case in CASES if "temperature" in case[1]], ids=case_id
)
@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_value_equals_the_float64_formula_at_other_temperatures(
    name: str, settings: Settings, temperature: float
) -> None:
    settings = settings | {"temperature": temperature}
    for seed in range(3):
        tensors = draw(seed)
        expected = REFERENCES[name](arrays_of(tensors), settings)
        assert call(name, tensors, settings).item() == pytest.approx(
            expected, rel=1e-5, abs=tolerance(settings)
        )


@every_case
def test_gradient_equals_differences_of_the_float64_formula(name: str, settings: Settings) -> None:
    tensors, key = draw(11, batch=4, classes=6), student_of(name)
    tensors[key].requires_grad_()
    call(name, tensors, settings).backward()
    gradient = tensors[key].grad
    assert gradient is not None
    arrays = arrays_of({name_: value.detach() for name_, value in tensors.items()})
    numeric = np.zeros_like(arrays[key])
    for index in np.ndindex(numeric.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = arrays[key].copy()
            moved[index] += step
            values.append(REFERENCES[name](arrays | {key: moved}, settings))
        numeric[index] = (values[0] - values[1]) / 2e-5
    np.testing.assert_allclose(gradient.numpy(), numeric, rtol=1e-4, atol=5e-6)
