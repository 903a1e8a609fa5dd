"""Every record of the loss registries: its signature, its docstring, its section of the settings, what it refuses."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest
import torch

from krd_ray.config_loss import ClassificationConfig, LossConfig, Term
from krd_ray.errors import ConfigError, ShapeError
from krd_ray.maths.losses import CLASSIFICATION_LOSSES, DISTILLATION_TERMS, TENSORS
from tests.unit.loss_references import RECORDS, SETTINGS, STUDENT, call, draw, student_of

every_loss = pytest.mark.parametrize("name", RECORDS)


# ---- the record


@every_loss
def test_signature_is_what_the_record_says(name: str) -> None:
    record = RECORDS[name]
    parameters = inspect.signature(record.fn).parameters
    assert set(parameters) == record.needs | set(record.params)
    assert len(parameters) == len(record.needs) + len(record.params)
    for parameter in parameters.values():
        assert parameter.default is parameter.empty, "a default lives in the configuration alone"
        assert parameter.kind is (
            parameter.KEYWORD_ONLY if parameter.name in record.params else parameter.POSITIONAL_OR_KEYWORD
        )
    assert record.needs <= TENSORS
    assert len(record.needs & STUDENT) == 1


@every_loss
def test_record_names_its_paper_and_the_docstring_explains_it(name: str) -> None:
    record = RECORDS[name]
    identifiers = re.findall(r"arXiv:\d{4}\.\d{5}", record.source)
    assert identifiers or record.source == "maximum likelihood"
    text = inspect.getdoc(record.fn) or ""
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Deviation:", "Example:", ">>> ", *identifiers):
        assert part in text, part
    for parameter in inspect.signature(record.fn).parameters:
        assert f"    {parameter}: " in text, parameter


def test_records_and_sections_of_the_configuration_match() -> None:
    assert set(get_args(ClassificationConfig.model_fields["name"].annotation)) == set(CLASSIFICATION_LOSSES)
    for record in CLASSIFICATION_LOSSES.values():
        assert set(record.params) <= set(ClassificationConfig.model_fields)
    config = LossConfig()
    sections = {key: getattr(config, key) for key in LossConfig.model_fields}
    terms = {key: section for key, section in sections.items() if isinstance(section, Term)}
    assert set(terms) == set(DISTILLATION_TERMS)
    for name, record in DISTILLATION_TERMS.items():
        assert set(record.params) <= set(type(terms[name]).model_fields), name
    assert not set(CLASSIFICATION_LOSSES) & set(DISTILLATION_TERMS)


@every_loss
def test_loss_runs_with_the_defaults_of_the_configuration(name: str) -> None:
    config = LossConfig()
    section = config.classification if name in CLASSIFICATION_LOSSES else getattr(config, name)
    loss = call(name, draw(0), {param: getattr(section, param) for param in RECORDS[name].params})
    assert torch.isfinite(loss)
    assert loss >= 0


# ---- refusals


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in RECORDS for key in sorted(RECORDS[name].needs)]
)
def test_tensor_of_another_size_is_refused(name: str, key: str) -> None:
    tensors = draw(0)
    tensors[key] = tensors[key][:-1]
    with pytest.raises(ShapeError, match=r"has shape \(\d.*\(\d.*; expected \["):
        call(name, tensors, SETTINGS[name][0])


@every_loss
def test_tensors_of_another_width_are_refused(name: str) -> None:
    tensors, key = draw(0), student_of(name)
    tensors[key] = tensors[key][:, :-1]
    with pytest.raises(ShapeError):
        call(name, tensors, SETTINGS[name][0])


OUT_OF_RANGE = {
    "temperature": [0.0, -1.0, float("nan"), float("inf")],
    "tau": [-0.1, float("nan"), float("inf")],
    "tau_prior": [-0.1, float("nan"), float("inf")],
    "gamma": [-1.0, float("nan"), float("inf")],
    "max_margin": [-1.0, float("nan"), float("inf")],
    "scale": [0.0, -1.0, float("nan"), float("inf")],
    "power": [0.0, -1.0, float("nan"), float("inf")],
    "alpha": [-1.0, float("nan"), float("inf")],
    "form": ["angle"],
    "space": ["flat"],
    "weighting": ["some"],
    "gate": ["half"],
}


@every_loss
def test_setting_out_of_range_is_refused_by_name(name: str) -> None:
    good = SETTINGS[name][0] | ({"weighting": "effective_number"} if name == "lrd" else {})
    for setting in RECORDS[name].params:
        bad = OUT_OF_RANGE.get(setting, [-0.1, float("nan"), float("inf")])
        if setting == "beta" and name not in {"dkd", "ltkd"}:
            bad = [*bad, 1.0]
        for value in bad:
            with pytest.raises(ConfigError, match=rf"^{setting} must be .*, got {value!r}"):
                call(name, draw(0), good | {setting: value})
