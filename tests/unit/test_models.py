"""Answers whether every model has its published size, the promised output, and weights fixed by the seed.

Does not train anything.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models import torchvision_import
from krd_ray.models.cifar_resnet import BasicBlock, PadShortcut, make_shortcut
from krd_ray.models.model_cost import build_on_meta, count_flops
from krd_ray.models.outputs import Classifier, ModelOutput, feature_dim_of
from krd_ray.models.registry import build_model, describe_model, list_models
from krd_ray.models.torchvision_import import import_torchvision
from krd_ray.models.torchvision_nets import (
    REFUSED,
    build_torchvision_on_meta,
    find_head,
    rename_torchvision_keys,
    torchvision_names,
)
from krd_ray.models.wide_resnet import PreActivationBlock

OWN_NAMES = list_models()
ONE_PER_KIND = ["resnet8", "resnet8x4", "wrn_16_2", "digits_net_16"]

# Published: He et al. 2015 table 6 (0.27, 0.46, 0.85, 1.7 M); Zagoruyko and Komodakis 2016 table 4 (2.2 M for
# WRN-40-2); to the last digit, the checkpoints that the distillation papers distribute.
PUBLISHED_NUM_PARAMS = {
    ("resnet20", 10): 269_722,
    ("resnet32", 10): 464_154,
    ("resnet56", 10): 853_018,
    ("resnet110", 10): 1_727_962,
    ("wrn_16_2", 100): 703_284,
    ("wrn_40_2", 100): 2_255_156,
    ("resnet8x4", 100): 1_233_540,
    ("resnet32x4", 100): 7_433_860,
}

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


# Sizes


@pytest.mark.parametrize(("name", "num_classes"), PUBLISHED_NUM_PARAMS)
def test_parameter_count_is_the_published_one(name: str, num_classes: int) -> None:
    info = describe_model(name, num_classes=num_classes, image_size=32)
    assert info.num_params == PUBLISHED_NUM_PARAMS[name, num_classes]


@pytest.mark.parametrize(
    ("name", "depth"),
    [("resnet8", 8), ("resnet20", 20), ("resnet110", 110), ("resnet32x4", 32), ("wrn_16_2", 16)],
)
def test_depth_in_the_name_counts_the_weighted_layers_on_the_main_path(name: str, depth: int) -> None:
    on_path = [
        module
        for module in build(name).modules()
        if (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)) or isinstance(module, nn.Linear)
    ]
    # A WRN's name counts its 1x1 projections as one layer each stage: 16 = 13 (3x3 and linear) + 3.
    assert len(on_path) == (depth - 2 if name.startswith("wrn") else depth)


def test_described_model_is_the_one_that_is_built() -> None:
    for name in OWN_NAMES:
        model = build(name)
        info = describe_model(name, num_classes=10, image_size=8)
        assert info.num_params == sum(parameter.numel() for parameter in model.parameters())
        assert info.feature_dim == feature_dim_of(model)
        if name in ONE_PER_KIND:
            assert info.num_flops == count_flops(model, image_size=8)
    assert len(OWN_NAMES) == 14


def test_flops_are_two_per_multiply_add_of_convolutions_and_head() -> None:
    width, num_classes = 8, 10
    per_pixel = [27 * width, 9 * width * 2 * width, 9 * 2 * width * 4 * width]
    num_pixels = [64, 16, 16]
    multiply_adds = sum(np.multiply(per_pixel, num_pixels)) + 4 * width * num_classes
    info = describe_model("digits_net_8", num_classes=num_classes, image_size=8)
    assert info.num_flops == 2 * multiply_adds


def test_feature_dim_of_digits_net_grows_with_width() -> None:
    for width in (2, 7, 64, 256):
        info = describe_model(f"digits_net_{width}", num_classes=10, image_size=8)
        assert info.feature_dim == 4 * width


def test_counting_flops_leaves_each_training_flag_as_it_was() -> None:
    model = build("resnet8")
    model.get_submodule("head").eval()
    count_flops(model, image_size=8)
    assert model.training
    assert not model.get_submodule("head").training


# Output


@pytest.mark.parametrize("name", ONE_PER_KIND)
@pytest.mark.parametrize("side", [8, 16, 32, 64, 11])
def test_any_side_gives_logits_and_features_in_both_modes(name: str, side: int) -> None:
    model = build(name, num_classes=7, image_size=side)
    for mode in (True, False):
        output = model.train(mode)(images(2, side))
        assert isinstance(output, ModelOutput)
        assert output.logits.shape == (2, 7)
        assert output.features.shape == (2, feature_dim_of(model))
        assert torch.isfinite(output.logits).all()


def assert_head_is_linear_in_features(model: nn.Module, images_BCHW: Tensor) -> None:
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        logits, features = model(images_BCHW)
    weight = head.weight.detach().double().numpy()
    expected = np.einsum("bd,cd->bc", features.double().numpy(), weight) + head.bias.detach().double().numpy()
    np.testing.assert_allclose(logits.double().numpy(), expected, rtol=1e-4, atol=1e-5)


def assert_all_parameters_get_gradients(model: nn.Module, images_BCHW: Tensor) -> None:
    model.train()
    logits, _ = model(images_BCHW)
    loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert [name for name, gradient in zip(names, gradients, strict=True) if gradient is None] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", OWN_NAMES)
def test_own_model_is_linear_in_its_features_and_uses_every_parameter(name: str) -> None:
    model = build(name)
    assert_head_is_linear_in_features(model, images(4, 8))
    assert_all_parameters_get_gradients(model, images(4, 8))


@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_evaluation_output_of_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = build(name).eval()
    together = model(images(4, 8)).features
    alone = torch.cat([model(image[None]).features for image in images(4, 8)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_one_model_serves_several_threads() -> None:
    model = build("resnet8").eval()
    batches = [images(2, 8, seed) for seed in range(16)]
    with torch.no_grad():
        expected = [model(batch).features for batch in batches]

    def features(batch: Tensor) -> Tensor:
        with torch.no_grad():
            output: ModelOutput = model(batch)
        return output.features

    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(features, batches), expected, strict=True):
            torch.testing.assert_close(found, one)


def test_pad_shortcut_drops_pixels_and_adds_zero_channels() -> None:
    x_BCHW = images(2, 5)
    found = PadShortcut(3, 8, stride=2)(x_BCHW).numpy()
    expected = np.zeros((2, 8, 3, 3), dtype=np.float32)
    for row in range(3):
        for column in range(3):
            expected[:, :3, row, column] = x_BCHW.numpy()[:, :, 2 * row, 2 * column]
    np.testing.assert_array_equal(found, expected)


def test_shortcut_is_the_identity_where_the_shape_stays() -> None:
    assert isinstance(make_shortcut("project", 16, 16, 1), nn.Identity)
    assert isinstance(make_shortcut("project", 16, 16, 2), nn.Sequential)
    assert sum(p.numel() for p in make_shortcut("pad", 16, 32, 2).parameters()) == 0


def test_basic_block_with_silent_inner_path_is_a_relu() -> None:
    block = BasicBlock(3, 3, stride=1, shortcut="pad")
    nn.init.zeros_(block.bn2.weight)
    x_BCHW = images(2, 8)
    torch.testing.assert_close(block(x_BCHW), x_BCHW.clamp(min=0))


def test_pre_activation_block_with_silent_inner_path_changes_nothing() -> None:
    block = PreActivationBlock(3, 3, stride=1)
    nn.init.zeros_(block.conv2.weight)
    x_BCHW = images(2, 8)
    torch.testing.assert_close(block(x_BCHW), x_BCHW)


# Weights and seeds


@pytest.mark.parametrize("name", [*ONE_PER_KIND, "torchvision:shufflenet_v2_x0_5"])
def test_weights_are_a_function_of_the_seed_alone(name: str) -> None:
    first = build(name, image_size=32, seed=3).state_dict()
    torch.rand(17)  # moves the global generator
    again = build(name, image_size=32, seed=3).state_dict()
    other = build(name, image_size=32, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_building_and_describing_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build("resnet8", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    describe_model("torchvision:swin_t", num_classes=10, image_size=32)  # draws for small real tensors
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_are_built_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        model = build("digits_net_4")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_initial_weights_follow_kaiming() -> None:
    model = build("wrn_40_2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            expected_std = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected_std, rel=0.03), name
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
    assert torch.equal(model.get_parameter("head.bias"), torch.zeros(10))


def test_state_dict_moves_between_two_models_of_one_name() -> None:
    source, target = build("resnet8", seed=1).eval(), build("resnet8", seed=2).eval()
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(images(2, 8)).logits, target(images(2, 8)).logits)
    assert torch.equal(copy.deepcopy(source)(images(2, 8)).logits, target(images(2, 8)).logits)


@pytest.mark.parametrize("name", ["resnet8", "torchvision:mnasnet0_5"])
def test_weights_load_from_a_plain_dict_as_safetensors_gives(name: str) -> None:
    source, target = build(name, image_size=32, seed=1).eval(), build(name, image_size=32, seed=2).eval()
    target.load_state_dict(dict(source.state_dict()))
    assert torch.equal(source(images(2, 32)).logits, target(images(2, 32)).logits)


def test_renamed_torchvision_weights_keep_their_version() -> None:
    model = build_torchvision_on_meta("mnasnet0_5", num_classes=5, image_size=32)
    original = import_torchvision().models.mnasnet0_5(weights=None, num_classes=5)
    renamed = rename_torchvision_keys(original.state_dict(), model)
    assert set(renamed) == set(model.state_dict())
    assert getattr(renamed, "_metadata", {})["backbone"] == {"version": 2}


# torchvision


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
        torch.testing.assert_close(model(images(1, side)).logits, original(images(1, side)))
    assert_head_is_linear_in_features(model, images(1, side))


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 32), ("mobilenet_v3_small", 32), ("googlenet", 32), ("shufflenet_v2_x0_5", 32)],
)
def test_built_torchvision_model_uses_every_parameter(name: str, side: int) -> None:
    model = build(f"torchvision:{name}", image_size=side)
    assert_all_parameters_get_gradients(model, images(4, side))
    assert model(images(4, side)).features.shape == (4, feature_dim_of(model))


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
    compiled = importlib.util.find_spec("_ctypes")
    assert compiled is not None
    assert compiled.origin is not None
    if content == "working":  # any library that loads stands in for torchvision's
        shutil.copy(compiled.origin, package / "_C.so")
    elif content == "broken":
        (package / "_C.so").write_bytes(b"not a library")
    spec = importlib.util.spec_from_file_location(
        "torchvision", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    assert torchvision_import._compiled_part_loads() is loads


# Names and numbers that are refused


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnt20", "resnet20"),
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:resnet_18", "torchvision:resnet18"),
        ("torchvision.models:resnet18", "torchvision:resnet18"),
        ("wrn_16_4", "wrn_16_2"),
        ("digits_net_x", "digits_net_4"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no model '{name}'; nearest: .*{near}"):
        build(name)


@pytest.mark.parametrize(
    ("name", "num_classes", "image_size", "message"),
    [
        ("digits_net_1", 10, 8, "width must be 2 to 256, got 1"),
        ("digits_net_257", 10, 8, "width must be 2 to 256, got 257"),
        ("resnet20", 1, 8, "num_classes >= 2, got 1"),
        ("resnet20", 10, 7, "at least 8 pixels a side, got 7"),
        ("torchvision:resnet18", 10, 0, "at least 1 pixels a side, got 0"),
    ],
)
def test_impossible_numbers_are_refused(name: str, num_classes: int, image_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, num_classes=num_classes, image_size=image_size)
    with pytest.raises(ConfigError, match=message):
        describe_model(name, num_classes=num_classes, image_size=image_size)


def test_feature_dim_of_a_foreign_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no integer attribute feature_dim"):
        feature_dim_of(nn.Linear(2, 2))


# Users' own models

USERS_MODULE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes, answer):
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.head = nn.Linear(6, num_classes)
            self.dropout = nn.Dropout(0.5).eval()  # a part that its owner keeps in evaluation mode
            self.answer = answer

        def forward(self, x):
            features = self.body(x).mean(dim=(2, 3))
            return self.answer(self.head(features), features)

    def good(num_classes, image_size):
        return Net(num_classes, lambda logits, features: (logits, features))

    def also_good(**settings):
        return good(**settings)

    def logits_only(num_classes, image_size):
        return Net(num_classes, lambda logits, features: logits)

    def swapped(num_classes, image_size):
        return Net(num_classes, lambda logits, features: (features, logits))

    def flat(num_classes, image_size):
        return Net(num_classes, lambda logits, features: (logits, features.mean(dim=1)))

    def three(num_classes, image_size):
        return Net(num_classes, lambda logits, features: (logits, features, features))

    def no_module(num_classes, image_size):
        return "resnet20"

    def wrong_arguments(classes):
        return good(classes, 8)

    def crashes(num_classes, image_size):
        return nn.Linear(3, 4)

    not_callable = 3
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_nets.py").write_text(textwrap.dedent(USERS_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return "users_nets"


@pytest.mark.parametrize("fn", ["good", "also_good"])
def test_users_model_is_built_and_described(users_module: str, fn: str) -> None:
    name = f"{users_module}:{fn}"
    model = build(name, num_classes=5)
    output = model(images(2, 8))
    assert isinstance(output, ModelOutput)
    assert output.logits.shape == (2, 5)
    info = describe_model(name, num_classes=5, image_size=8)
    assert info == (name, 3 * 6 * 9 + 6 + 6 * 5 + 5, 2 * (36 * 6 * 27 + 30), 6)
    assert feature_dim_of(model) == 6


def test_trying_a_users_model_keeps_its_training_flags_and_the_seed(users_module: str) -> None:
    first, again = build(f"{users_module}:good", seed=1), build(f"{users_module}:good", seed=1)
    assert torch.equal(first.get_parameter("net.head.weight"), again.get_parameter("net.head.weight"))
    assert first.training
    assert not first.get_submodule("net.dropout").training


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        ("logits_only", r"returned a torch.float32 tensor of shape \[2, 10\]; expected logits \[B, 10\]"),
        ("swapped", "returned logits for 6 classes; expected"),
        ("flat", r"returned a tuple of .*shape \[2\].* for 2 images; expected"),
        ("three", "returned a tuple of .*expected .*tuple of two"),
        ("no_module", "must return a torch.nn.Module, returned str"),
        ("wrong_arguments", r"called as fn\(num_classes=..., image_size=...\)"),
        ("crashes", "failed on a batch of 2 RGB images of 8x8 pixels: RuntimeError"),
        ("not_callable", "has no callable 'not_callable'"),
        ("goood", "has no callable 'goood'; nearest: good"),
    ],
)
def test_users_model_outside_the_contract_is_refused(users_module: str, fn: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(f"{users_module}:{fn}")


def test_users_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot import no_such_package\.nets"):
        build("no_such_package.nets:fn")


# Building without memory


def test_build_on_meta_lets_constructors_compute_with_tensors() -> None:
    def make() -> nn.Module:
        width = int(torch.arange(1, 4).sum().item())
        layer = nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))
        nn.init.trunc_normal_(layer.get_parameter("0.weight"))
        return layer

    layer = build_on_meta(make)
    assert layer.get_parameter("0.weight").shape == (2, 6)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_classifier_is_differentiable_through_both_outputs() -> None:
    model = Classifier(nn.Flatten(), nn.Linear(12, 5))
    x_BCHW = images(2, 2).requires_grad_()
    output = model(x_BCHW)
    (output.features.sum() + 0 * output.logits.sum()).backward()
    assert x_BCHW.grad is not None
    torch.testing.assert_close(x_BCHW.grad, torch.ones_like(x_BCHW))
