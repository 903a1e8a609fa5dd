"""Answers how a classification model of torchvision becomes one that returns logits and features.

Does not download weights and does not import torchvision until it is asked for a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from krd_ray.errors import ConfigError
from krd_ray.models.model_cost import build_on_meta, count_flops
from krd_ray.models.outputs import Classifier, with_versions
from krd_ray.models.torchvision_import import import_torchvision

PREFIX = "torchvision:"

SQUEEZENET_REASON = (
    "its logits are the average of a rectified convolution, so they are never negative "
    "and no feature vector yields them through a linear layer"
)


def torchvision_names() -> list[str]:
    """Lists the classification models of the installed torchvision that can be built, without the prefix.

    Example:
        >>> "resnet18" in torchvision_names(), "squeezenet1_1" in torchvision_names()
        (True, False)
    """
    models = import_torchvision().models
    return [name for name in models.list_models(module=models) if name not in REFUSED]


def build_torchvision(name: str, *, num_classes: int, image_size: int) -> Classifier:
    """Builds a torchvision model with new weights and moves its last linear layer into `Classifier.head`.

    Auxiliary classifiers are off. Tried out first without memory for weights, so that a side which the
    network cannot take is refused before anything is allocated.

    Args:
        name: without the prefix, one of `torchvision_names()`.
        num_classes: C >= 2.
        image_size: side in pixels; vision transformers are built for exactly this side.
    Returns:
        The classifier; weights are drawn from torch's global generator by torchvision's own initialisation.
    Raises:
        ConfigError: the model has no linear classifier, or cannot take images of this side.

    Example:
        >>> build_torchvision("resnet18", num_classes=5, image_size=32).head
        Linear(in_features=512, out_features=5, bias=True)
    """
    dry_run_torchvision(name, num_classes=num_classes, image_size=image_size)
    return _construct(name, num_classes=num_classes, image_size=image_size)


def dry_run_torchvision(name: str, *, num_classes: int, image_size: int) -> tuple[Classifier, int]:
    """Builds a model without storage and runs one forward of it, shapes only.

    Returns:
        The model, on the meta device, and the FLOPs of the forward (one image; see `count_flops`).
    Raises:
        ConfigError: the model has no linear classifier, or cannot take images of this side.

    Example:
        >>> model, num_flops = dry_run_torchvision("resnet18", num_classes=1000, image_size=224)
        >>> round(num_flops / 2e9, 2)  # published: 1.81 G multiply-adds
        1.81
    """
    model = build_torchvision_on_meta(name, num_classes=num_classes, image_size=image_size)
    try:
        return model, count_flops(model, image_size=image_size)
    except RuntimeError as error:  # a convolution or pooling whose output would be empty
        raise _side_refused(name, image_size, error) from error


def build_torchvision_on_meta(name: str, *, num_classes: int, image_size: int) -> Classifier:
    """Builds a model without storage; says less than `dry_run_torchvision` about the side, but faster.

    Raises:
        ConfigError: the model has no linear classifier, or is not made for images of this side.

    Example:
        >>> build_torchvision_on_meta("vit_b_16", num_classes=5, image_size=224).head.in_features
        768
    """
    if name in REFUSED:
        raise ConfigError(f"model '{PREFIX}{name}' cannot be used: {REFUSED[name]}; choose another one")
    try:
        return build_on_meta(lambda: _construct(name, num_classes=num_classes, image_size=image_size))
    except (ValueError, AssertionError) as error:  # what the constructors of transformers raise
        raise _side_refused(name, image_size, error) from error


def rename_torchvision_keys(state: Mapping[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """Renames the entries of a plain torchvision state dict to those of the classifier built from it.

    Args:
        state: keys as torchvision has them, such as "conv1.weight" and "fc.weight".
        model: built from the same architecture; loading checks shapes.
    Returns:
        A dict for `model.load_state_dict`; tensors are not copied, torch's version marks are kept if any.

    Example:
        >>> net = import_torchvision().models.resnet18(weights=None, num_classes=5)
        >>> model = build_torchvision("resnet18", num_classes=5, image_size=32)
        >>> model.load_state_dict(rename_torchvision_keys(net.state_dict(), model))
        <All keys matched successfully>
    """
    renamed = {_rename(key, model.head_path): tensor for key, tensor in state.items()}
    versions: dict[str, Any] | None = getattr(state, "_metadata", None)
    if versions is None:
        return renamed
    return with_versions(renamed, {_rename(key, model.head_path): mark for key, mark in versions.items()})


def find_head(network: nn.Module, *, num_classes: int) -> tuple[str, nn.Linear]:
    """Finds the classification layer: the last linear layer, in order of registration, with C outputs.

    Returns:
        Its dotted path and the layer.
    Raises:
        ConfigError: there is none.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5)), num_classes=5)[0]
        '1'
    """
    linear_layers = [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not linear_layers:
        raise ConfigError(
            f"{type(network).__name__} has no linear layer with {num_classes} outputs, so it has no features "
            "to distil; choose a model that ends in one"
        )
    return linear_layers[-1]


def _construct(name: str, *, num_classes: int, image_size: int) -> Classifier:
    models = import_torchvision().models
    settings = _settings_of(name, image_size)
    network = models.get_model(name, weights=None, num_classes=num_classes, **settings)
    head_path, head = find_head(network, num_classes=num_classes)
    network.set_submodule(head_path, nn.Identity())
    return Classifier(network, head, head_path=head_path)


def _settings_of(name: str, image_size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _rename(path: str, head_path: str) -> str:
    if path == head_path or path.startswith(head_path + "."):
        return "head" + path.removeprefix(head_path)
    return f"backbone.{path}" if path else "backbone"


def _side_refused(name: str, image_size: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"model '{PREFIX}{name}' cannot take images of {image_size}x{image_size} pixels "
        f"(torchvision says: {error}); choose another image side or another model"
    )


REFUSED: dict[str, str] = {"squeezenet1_0": SQUEEZENET_REASON, "squeezenet1_1": SQUEEZENET_REASON}
