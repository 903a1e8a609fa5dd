"""Answers whether every torchvision model gives logits and features, and how torchvision is imported.

Does not download weights.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic_core import _pydantic_core
from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models import torchvision_import
from krd_ray.models.outputs import feature_dim_of
from krd_ray.models.registry import build_model, describe_model, list_models
from krd_ray.models.torchvision_import import import_torchvision
from krd_ray.models.torchvision_nets import (
    REFUSED,
    build_torchvision_on_meta,
    find_head,
    rename_torchvision_keys,
    torchvision_names,
)

# Name, side: one small member of each family that is cheap enough to run.
SMALL_TORCHVISION = [
    ("resnet18", 32),
    ("mobilenet_v3_small", 32),
    ("shufflenet_v2_x0_5", 32),
    ("mnasnet0_5", 32),
    ("regnet_y_400mf", 32),
    ("efficientnet_b0", 32),
    ("densenet121", 32),
    ("convnext_tiny", 32),
    ("swin_t", 32),
    ("googlenet", 32),
]


def images(num: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


def build(name: str, *, num_classes: int = 10, image_size: int = 8, seed: int = 0) -> nn.Module:
    return build_model(name, num_classes=num_classes, image_size=image_size, seed=seed)


def test_every_torchvision_model_has_its_published_parameters_and_a_head_of_the_right_size() -> None:
    models = import_torchvision().models
    names = torchvision_names()
    problems: dict[str, str] = {}
    for name in names:
        weights = next(iter(models.get_model_weights(name)))
        side = weights.transforms.keywords["crop_size"]
        model = build_torchvision_on_meta(name, num_classes=1000, image_size=side)
        # torchvision counts Inception's auxiliary classifier, which is off here.
        published = weights.meta["num_params"] - (3_326_696 if name == "inception_v3" else 0)
        found = sum(parameter.numel() for parameter in model.parameters())
        if (found, model.head.out_features) != (published, 1000):
            problems[name] = f"{found} parameters, published {published}; head {model.head}"
    assert problems == {}
    assert len(names) == 78
    assert set(models.list_models(module=models)) == {*names, *REFUSED}


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "resnet50",
        "mobilenet_v3_large",
        "regnet_x_400mf",
        "vgg11",
        "vit_b_32",
        "swin_t",
        "convnext_tiny",
    ],
)
def test_torchvision_flops_are_twice_the_published_multiply_adds(name: str) -> None:
    weights = import_torchvision().models.get_model_weights(name)["IMAGENET1K_V1"]
    info = describe_model(f"torchvision:{name}", num_classes=1000, image_size=224)
    assert info.num_flops / 2e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)


@pytest.mark.parametrize(("name", "side"), SMALL_TORCHVISION)
def test_torchvision_model_gives_what_torchvision_gives(name: str, side: int) -> None:
    settings = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    original = import_torchvision().models.get_model(name, weights=None, num_classes=5, **settings).eval()
    model = build_torchvision_on_meta(name, num_classes=5, image_size=side).eval()
    model.load_state_dict(rename_torchvision_keys(original.state_dict(), model), assign=True)
    with torch.no_grad():
        logits, features = model(images(1, side))
        torch.testing.assert_close(logits, original(images(1, side)))
        from_features = features.double() @ model.head.weight.double().T + model.head.bias.double()
    np.testing.assert_allclose(logits.double().numpy(), from_features.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 32), ("mobilenet_v3_small", 32), ("googlenet", 32), ("shufflenet_v2_x0_5", 32)],
)
def test_built_torchvision_model_uses_every_parameter(name: str, side: int) -> None:
    model = build(f"torchvision:{name}", image_size=side)
    logits, features = model(images(4, side))
    assert features.shape == (4, feature_dim_of(model))
    loss = nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, gradient in zip(names, gradients, strict=True) if gradient is None] == []


def test_head_is_found_where_hidden_layers_have_as_many_outputs() -> None:
    model = build_torchvision_on_meta("vit_b_32", num_classes=768, image_size=32)
    assert model.head_path == "heads.head"


@pytest.mark.parametrize(("name", "side"), [("alexnet", 32), ("vit_b_16", 100), ("maxvit_t", 32)])
def test_side_that_a_torchvision_model_cannot_take_is_refused(name: str, side: int) -> None:
    with pytest.raises(ConfigError, match=f"'torchvision:{name}' cannot take images of {side}x{side}"):
        build(f"torchvision:{name}", image_size=side)


def test_vision_transformer_is_built_for_the_image_size() -> None:
    model = build_torchvision_on_meta("vit_b_32", num_classes=5, image_size=64)
    assert model.get_parameter("backbone.encoder.pos_embedding").shape == (1, 1 + 4, 768)


def test_squeezenet_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="rectified convolution"):
        build("torchvision:squeezenet1_1", image_size=64)
    assert "torchvision:squeezenet1_1" not in list_models(include_torchvision=True)


def test_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="no linear layer with 4 outputs"):
        find_head(nn.Sequential(nn.Linear(3, 5)), num_classes=4)


def test_importing_the_models_does_not_import_torchvision() -> None:
    code = "import sys, krd_ray.models.registry; print('torchvision' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_torchvision_transforms_work_after_the_import() -> None:
    torchvision = import_torchvision()
    assert torchvision is import_torchvision()
    from torchvision.transforms import v2

    assert v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)


@pytest.mark.parametrize(("content", "loads"), [(None, False), ("broken", False), ("working", True)])
def test_compiled_part_is_tried_before_operators_are_declared(
    content: str | None, loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    if content == "working":  # any library that loads stands in for torchvision's
        shutil.copy(_pydantic_core.__file__, package / "_C.so")
    elif content == "broken":
        (package / "_C.so").write_bytes(b"not a library")
    spec = importlib.util.spec_from_file_location(
        "torchvision", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    assert torchvision_import._compiled_part_loads() is loads


def test_renamed_torchvision_weights_keep_their_version() -> None:
    model = build_torchvision_on_meta("mnasnet0_5", num_classes=5, image_size=32)
    original = import_torchvision().models.mnasnet0_5(weights=None, num_classes=5)
    renamed = rename_torchvision_keys(original.state_dict(), model)
    assert set(renamed) == set(model.state_dict())
    assert getattr(renamed, "_metadata", {})["backbone"] == {"version": 2}
