"""Answers what every model of krd_ray returns, and how a backbone and a linear head make one such model.

Does not hold any architecture and does not know names (`registry` does).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from krd_ray.errors import ConfigError


class ModelOutput(NamedTuple):
    """What a forward gives: `logits` [B, C] and the `features` [B, D] that the last linear layer saw."""

    logits: Tensor
    features: Tensor


class Classifier(nn.Module):
    """A backbone that gives features [B, D], then one linear layer.

        logits = features @ head.weight.T + head.bias

    Features are a return value, not something a hook stores: safe with threads, DDP and torch.compile.
    With dropout in front of the head (some torchvision models) the features of a forward in training
    mode are those after dropout, so that the equation above always holds.

    Args:
        backbone: images [B, 3, H, W] -> features [B, D].
        head: the linear layer, D -> C.
        head_path: where the head sat in the model that the backbone was taken from; "" for own models.

    Example:
        >>> import torch
        >>> model = Classifier(nn.Flatten(), nn.Linear(12, 5))
        >>> logits, features = model(torch.zeros(2, 3, 2, 2))
        >>> tuple(logits.shape), tuple(features.shape), model.feature_dim
        ((2, 5), (2, 12), 12)
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, *, head_path: str = "") -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.head_path = head_path
        self.feature_dim: int = head.in_features

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        features = self.backbone(images_BCHW)
        return ModelOutput(logits=self.head(features), features=features)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch; a state dict without version marks is taken to be of the current version.

        torch keeps these marks in a hidden attribute that safetensors and plain dicts do not have, and
        some modules (torchvision's MNASNet) refuse to load without.
        """
        if not hasattr(state_dict, "_metadata"):
            state_dict = with_versions(state_dict, self.state_dict()._metadata)  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def with_versions(state: Mapping[str, Any], versions: dict[str, Any]) -> OrderedDict[str, Any]:
    """Copies a state dict (not its tensors) and marks it with the version of each module.

    Args:
        state: parameters and buffers by name.
        versions: by module path, what `state_dict()._metadata` holds.

    Example:
        >>> with_versions({"weight": 1.0}, {"": {"version": 1}})._metadata
        {'': {'version': 1}}
    """
    marked = OrderedDict(state)
    marked._metadata = versions  # type: ignore[attr-defined]
    return marked


def feature_dim_of(model: nn.Module) -> int:
    """Reads a built model's feature dimension D, typed.

    Args:
        model: what `registry.build_model` returned, not wrapped by DDP or torch.compile.
    Returns:
        D, the number of columns of `ModelOutput.features`.
    Raises:
        ConfigError: the module has no integer attribute `feature_dim`.

    Example:
        >>> feature_dim_of(Classifier(nn.Flatten(), nn.Linear(12, 5)))
        12
    """
    feature_dim = getattr(model, "feature_dim", None)
    if not isinstance(feature_dim, int):
        raise ConfigError(
            f"{type(model).__name__} has no integer attribute feature_dim; "
            "pass the module that build_model returned, before DDP or torch.compile wraps it"
        )
    return feature_dim
