"""Answers how weights from elsewhere become a teacher: checked, written with a card, measured on val as written.

Does not train.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from krd_ray.config import RunConfig
from krd_ray.errors import ConfigError
from krd_ray.storage.places import absolute
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.cluster import connected
from krd_ray.train.evaluate import evaluate_models
from krd_ray.train.prepare import Prepared, prepare

Channels = tuple[float, float, float]


def import_teacher(
    config: RunConfig,
    weights: Path | str,
    out: Path | str,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> ModelCard:
    """Writes `weights` as safetensors with a card, for the model of the config's only student.

    Args:
        config: with `teacher: null` and exactly one student, which names the model.
        weights: safetensors, or a state_dict file; path or URI.
        out: where to write; path or URI.
        mean, std: channel normalisation the weights were trained with, in [0, 1] units; None takes what the file's
            own card says, else the dataset's.
    Returns:
        The card, with the macro accuracy on the val split if there is one.
    Raises:
        ConfigError: more than one student.
        TeacherError: the weights do not fit.
    """
    if len(config.students) != 1:
        raise ConfigError(f"a teacher config has one student, this one has {len(config.students)}")
    prepared = prepare(config)
    model = config.students[0].model
    num_classes, side = prepared.manifest.num_classes, prepared.view.side
    net, own = load_model(weights, model=model, num_classes=num_classes, image_size=side)
    card = ModelCard(
        model=model,
        num_classes=num_classes,
        image_size=side,
        mean=mean or (own.mean if own else prepared.view.mean),
        std=std or (own.std if own else prepared.view.std),
        dataset=prepared.manifest.content_hash,
    )
    save_weights(net.state_dict(), card, out)
    card = replace(card, val_balanced=_accuracy(prepared, model, absolute(out)))
    save_weights(net.state_dict(), card, out)
    return card


def _accuracy(prepared: Prepared, model: str, weights: str) -> float | None:
    """Macro accuracy of the written file on the val split, on the CPU; None without one."""
    if prepared.val is None:
        return None
    models = {"imported": {"weights": weights, "model": model}}
    with connected(prepared.config.ray):
        remote: Any = ray.remote(num_cpus=0.25)
        results = ray.get(
            remote(evaluate_models).remote(
                models, prepared.val, prepared.view, prepared.class_counts, teacher=None, device="cpu"
            )
        )
    accuracy: float | None = results["imported"]["metrics"]["balanced"]
    return accuracy
