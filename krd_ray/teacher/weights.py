"""Answers how model weights get on and off the disk without unpickling anything.

Does not decide whether a teacher is good (`group` does).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from krd_ray.errors import TeacherError
from krd_ray.models.outputs import Classifier
from krd_ray.models.registry import build_model
from krd_ray.models.torchvision_nets import rename_torchvision_keys
from krd_ray.storage.node_copies import node_file, writing

CARD_KEY = "krd_ray"


@dataclass(frozen=True)
class ModelCard:
    """What must be known to use weights: written into the safetensors header by every run.

    Args:
        model: registry name.
        num_classes: C.
        image_size: side of the views it was trained on, pixels.
        mean, std: channel normalisation in [0, 1] units.
        dataset: content hash of the training shards.
        val_balanced: macro accuracy on that dataset's val split, in [0, 1]; None without one.
    """

    model: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dataset: str
    val_balanced: float | None = None


def save_weights(state: dict[str, Tensor], card: ModelCard, place: Path | str) -> None:
    """Writes weights and card as one safetensors file, atomically; to a path or a URI."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with writing(str(place)) as path:
        save_file(tensors, path, metadata={CARD_KEY: json.dumps(asdict(card))})


def read_weights(place: Path | str) -> tuple[dict[str, Tensor], ModelCard | None]:
    """Reads a safetensors file, or a state_dict file with `weights_only=True`, from a path or a URI.

    Raises:
        StorageError: the URI cannot be read.
        TeacherError: no such file, not a weights file, or it holds more than tensors.
    """
    path = node_file(str(place))
    if not path.is_file():
        raise TeacherError(f"teacher.weights: {path} does not exist; train one with `krd teacher CONFIG`")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # of torch, about pickle protocols; the error below says more
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch's reader trip in any way
        raise TeacherError(
            f"{path} is not a plain state_dict ({type(error).__name__}); only tensors are loaded, never "
            "pickled objects: save it again with torch.save(model.state_dict(), path) or as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TeacherError(f"{path} holds no state_dict (a mapping from names to tensors)")
    return {name.removeprefix("module."): value for name, value in content.items()}, None


def load_model(
    path: Path | str, *, model: str | None, num_classes: int, image_size: int
) -> tuple[nn.Module, ModelCard | None]:
    """Builds the model and loads its weights; every tensor must fit.

    Args:
        path: weights file, or its URI.
        model: registry name; None takes the name from the file's card.
        num_classes: C of the dataset.
        image_size: side of the views.
    Returns:
        The model in eval mode on the CPU, and the card if the file has one.
    Raises:
        TeacherError: no name given or found, other class count, other image size, or tensors that do not fit.
        ConfigError: no model of that name.
    """
    state, card = read_weights(path)
    name = model or (card.model if card else None)
    if model is None and name is not None and ":" in name and not name.startswith("torchvision:"):
        raise TeacherError(
            f"{path} names code as its model ({name}); a weights file may not choose what is run: "
            f"set teacher.model to {name} yourself if you trust it"
        )
    if name is None:
        raise TeacherError(f"{path} does not say which model it holds; set teacher.model")
    if card is not None and card.num_classes != num_classes:
        raise TeacherError(
            f"{path} was trained for {card.num_classes} classes, the dataset has {num_classes}; "
            "use a teacher of the same classes"
        )
    if card is not None and card.image_size != image_size:
        raise TeacherError(
            f"{path} was trained on {card.image_size} px views, this run makes {image_size} px views; "
            f"set views.side to {card.image_size}"
        )
    net = build_model(name, num_classes=num_classes, image_size=image_size, seed=0)
    if isinstance(net, Classifier) and not any(key.startswith("backbone.") for key in state):
        state = rename_torchvision_keys(state, net)  # a checkpoint saved by plain torchvision
    _load_exactly(net, state, path, name)
    return net.eval().requires_grad_(False), card


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], ModelCard | None]:
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get(CARD_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise TeacherError(
            f"{path} is not a readable safetensors file ({error}); copy or write it again"
        ) from error
    return state, None if card is None else _parse_card(card, path)


def _parse_card(card: str, path: Path) -> ModelCard:
    try:
        values = json.loads(card)
        return ModelCard(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    except (ValueError, LookupError, TypeError) as error:
        raise TeacherError(
            f"{path}: its {CARD_KEY} header is not one this version writes ({error}); "
            "write the file again with `krd teacher`"
        ) from error


def _load_exactly(net: nn.Module, state: dict[str, Tensor], path: Path | str, name: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    missing = sorted(wanted.keys() - given.keys())
    extra = sorted(given.keys() - wanted.keys())
    other = [
        f"{key} is {given[key]}, needs {wanted[key]}"
        for key in wanted
        if key in given and wanted[key] != given[key]
    ]
    if missing or extra or other:
        parts = [
            f"{len(missing)} tensors missing (first: {missing[0]})" if missing else "",
            f"{len(extra)} unknown (first: {extra[0]})" if extra else "",
            f"{len(other)} of another shape (first: {other[0]})" if other else "",
        ]
        raise TeacherError(
            f"{path} does not fit model {name!r}: {'; '.join(part for part in parts if part)}; "
            "check teacher.model and the number of classes"
        )
    net.load_state_dict(state)


def hash_state(state: dict[str, Tensor], *more: str) -> str:
    """Returns a hex name for weights plus whatever else decides the outputs (preprocessing, view spec, dtype)."""
    digest = hashlib.sha256("\0".join(more).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
