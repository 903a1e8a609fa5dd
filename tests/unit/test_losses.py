"""One conformance suite over both registries of losses: what every loss promises, whatever its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS, TENSORS
from krd_ray.maths.rectify import rectify_logits
from tests.unit.loss_references import (
    CASES,
    PER_CLASS,
    RECORDS,
    Settings,
    arrays_of,
    call,
    case_id,
    class_weighted,
    draw,
    groups_of,
    log_softmax,
    rebalanced_mass,
    student_of,
)

every_loss = pytest.mark.parametrize("name", RECORDS)
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=case_id)
PER_SAMPLE = TENSORS - PER_CLASS
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(tensors: Tensors, index: Tensor) -> Tensors:
    """The samples `index` of a batch."""
    return {key: value[index] if key in PER_SAMPLE else value for key, value in tensors.items()}


# ---- type, range, gradient


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_loss_is_computed_in_float32_whatever_the_dtype(
    name: str, settings: Settings, dtype: torch.dtype
) -> None:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in draw(1).items()}
    before = {key: value.clone() for key, value in given.items()}
    loss = call(name, given, settings)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    in_float32 = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in given.items()}
    assert torch.equal(loss, call(name, in_float32, settings))
    assert all(torch.equal(given[key], before[key]) for key in given), "an input was written to"


@every_case
@pytest.mark.parametrize("scale", [1e4, 50.0, 1e-6, 0.0])
def test_loss_and_gradient_are_finite_for_extreme_inputs(name: str, settings: Settings, scale: float) -> None:
    tensors = draw(2, scale=scale)
    student = tensors[student_of(name)].requires_grad_()
    loss = call(name, tensors, settings)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@every_case
def test_gradient_reaches_the_student_and_nobody_else(name: str, settings: Settings) -> None:
    tensors = draw(3)
    for value in tensors.values():
        if value.is_floating_point():
            value.requires_grad_()
    call(name, tensors, settings).backward()
    for key, value in tensors.items():
        if key == student_of(name):
            assert value.grad is not None
            assert (value.grad.abs().sum(dim=1) > 0).all(), "a sample has no say"
        else:
            assert value.grad is None, key


# ---- the batch


@every_case
def test_order_of_the_batch_does_not_matter(name: str, settings: Settings) -> None:
    tensors = draw(4)
    shuffled = rows(tensors, torch.tensor([3, 1, 5, 0, 4, 2]))
    assert call(name, shuffled, settings).item() == pytest.approx(
        call(name, tensors, settings).item(), rel=1e-5
    )


@every_case
def test_batch_given_twice_has_the_same_loss(name: str, settings: Settings) -> None:
    tensors = draw(5)
    twice = rows(tensors, torch.arange(6).repeat(2))
    assert call(name, twice, settings).item() == pytest.approx(call(name, tensors, settings).item(), rel=1e-5)


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] != "ltkd"], ids=case_id)
def test_loss_is_the_mean_of_what_each_sample_gives_alone(name: str, settings: Settings) -> None:
    tensors = draw(6)
    weights = torch.ones(6)
    if name in CLASSIFICATION_LOSSES:
        weights = tensors["class_weights"][tensors["labels"]]
    if name == "class_balanced":
        log_v = class_weighted(np.zeros(7), tensors["class_counts"].numpy(), settings["beta"])
        weights = weights * torch.tensor(np.exp(log_v))[tensors["labels"]]
    alone = torch.stack([call(name, rows(tensors, torch.tensor([i])), settings) for i in range(6)])
    mean = (weights * alone).sum() / weights.sum()
    assert call(name, tensors, settings).item() == pytest.approx(mean.item(), rel=1e-5)


# ---- the classes


@every_case
def test_names_of_classes_and_order_of_dimensions_do_not_matter(name: str, settings: Settings) -> None:
    tensors = draw(7)
    assert len(tensors["class_counts"].unique()) == 7
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    renamed = dict(tensors)
    for key, value in tensors.items():
        if key == "labels":
            renamed[key] = order.argsort()[value]
        elif key in PER_CLASS:
            renamed[key] = value[order]
        else:
            renamed[key] = value[:, order] if key.endswith("logits") else value.flip(1)
    assert call(name, renamed, settings).item() == pytest.approx(
        call(name, tensors, settings).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [(*case, key) for case in CASES for key in sorted(RECORDS[case[0]].needs) if key.endswith("_logits")],
    ids=case_id,
)
def test_constant_added_to_the_logits_of_a_sample_changes_nothing(
    name: str, settings: Settings, key: str
) -> None:
    tensors = draw(8)
    moved = tensors | {key: tensors[key] + torch.linspace(-3, 3, 6)[:, None]}
    expected = call(name, tensors, settings).item()
    assert call(name, moved, settings).item() == pytest.approx(expected, rel=2e-5)


# ---- agreement

Agreement = Callable[[Tensors, Settings], Tensor]


def _ltkd_agreement(tensors: Tensors, s: Settings) -> Tensor:
    """T log of (rebalanced mass of the group times the teacher's distribution within it)."""
    arrays = arrays_of(tensors)
    mass, student = rebalanced_mass(arrays, s["temperature"]), np.zeros_like(arrays["teacher_logits"])
    for i, z in enumerate(arrays["teacher_logits"]):
        for g, group in enumerate(groups_of(arrays["class_counts"])):
            student[i, group] = np.log(mass[i, g]) + log_softmax(z[group] / s["temperature"])
    return torch.tensor(s["temperature"] * student)


def _by_class(tensors: Tensors, key: str, s: Settings, shift: Tensor | float = 0.0) -> Tensor:
    """Logits whose softened distribution is the teacher's, weighed by class."""
    counts, temperature = tensors["class_counts"].numpy(), s["temperature"]
    soft = ((tensors[key] + shift) / temperature).double().numpy()
    return torch.tensor(temperature * np.stack([class_weighted(z, counts, s["beta"]) for z in soft])) - shift


def _lrd_agreement(tensors: Tensors, s: Settings) -> Tensor:
    if s["weighting"] == "none":
        return tensors["rectified_logits"]
    counts = tensors["class_counts"]
    shift = s["tau_prior"] * (counts / counts.sum()).log() if s["space"] == "long_tailed" else 0.0
    return _by_class(tensors, "rectified_logits", s, shift)


AGREEMENTS: dict[str, Agreement] = {
    "kd": lambda t, _s: t["teacher_logits"],
    "dkd": lambda t, _s: t["teacher_logits"],
    "bkd": lambda t, s: _by_class(t, "teacher_logits", s),
    "ltkd": _ltkd_agreement,
    "dive": lambda t, s: s["power"] * t["teacher_logits"],
    "nd": lambda t, _s: t["rectified_features"],
    "knowledge_adjustment": lambda t, _s: rectify_logits(
        t["teacher_logits"], t["labels"], torch.zeros(7), tau_prior=0.0, exchange=True
    ),
    "rrd": lambda t, _s: t["rectified_features"],
    "lrd": _lrd_agreement,
}


def test_every_term_but_two_is_zero_at_agreement() -> None:
    assert set(DISTILLATION_TERMS) - set(AGREEMENTS) == {"cckd", "pld"}


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] in AGREEMENTS], ids=case_id)
def test_distance_is_zero_at_agreement_and_positive_elsewhere(name: str, settings: Settings) -> None:
    tensors, key = draw(9), student_of(name)
    tensors[key] = AGREEMENTS[name](tensors, settings).float().clone().requires_grad_()
    loss = call(name, tensors, settings)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    gradient = tensors[key].grad
    assert gradient is not None
    if (
        name != "nd" and settings.get("form") != "norm_aware"
    ):  # there, a corner: shorter pays, longer does not
        assert gradient.abs().max() < 1e-5
    elsewhere = tensors | {key: tensors[key].detach() + draw(10)[key]}
    assert call(name, elsewhere, settings) > 1e-3
