"""Answers whether every model has its published size, the promised output, and weights fixed by the seed.

Does not train anything.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models.cifar_resnet import BasicBlock, PadShortcut, make_shortcut
from krd_ray.models.model_cost import build_on_meta, count_flops
from krd_ray.models.outputs import Classifier, ModelOutput, feature_dim_of
from krd_ray.models.registry import build_model, describe_model, list_models
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
