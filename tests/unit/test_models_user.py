"""Answers whether a user's own model is built, checked and refused with a message that says why.

Does not test krd_ray's own networks.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models.outputs import ModelOutput, feature_dim_of
from krd_ray.models.registry import build_model, describe_model


def images(num: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


def build(name: str, *, num_classes: int = 10, image_size: int = 8, seed: int = 0) -> nn.Module:
    return build_model(name, num_classes=num_classes, image_size=image_size, seed=seed)


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
