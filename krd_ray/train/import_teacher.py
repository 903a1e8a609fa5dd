"""Answers how weights from elsewhere become a teacher: checked, measured on val, written with a card.

Does not train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from krd_ray.config import RunConfig
from krd_ray.errors import ConfigError
from krd_ray.teacher.weights import ModelCard, load_model, save_weights
from krd_ray.train.cluster import connected
from krd_ray.train.evaluate import evaluate_models
from krd_ray.train.prepare import prepare


def import_teacher(config: RunConfig, weights: Path, out: Path) -> ModelCard:
    """Writes `weights` as safetensors with a card, for the model of the config's only student.

    Args:
        config: with `teacher: null` and exactly one student, which names the model.
        weights: safetensors, or a state_dict file.
        out: where to write.
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
    num_classes = prepared.manifest.num_classes
    net, _ = load_model(weights, model=model, num_classes=num_classes, image_size=prepared.view.side)
    accuracy = None
    if prepared.val is not None:
        entry = {"weights": str(weights.resolve()), "model": model}
        with connected(config.ray):
            remote: Any = ray.remote(num_cpus=0.25)
            results = ray.get(
                remote(evaluate_models).remote(
                    {"imported": entry}, prepared.val, prepared.view, prepared.class_counts, teacher=None
                )
            )
        accuracy = results["imported"]["metrics"]["balanced"]
    card = ModelCard(
        model=model,
        num_classes=num_classes,
        image_size=prepared.view.side,
        mean=prepared.view.mean,
        std=prepared.view.std,
        dataset=prepared.manifest.content_hash,
        val_balanced=accuracy,
    )
    save_weights(net.state_dict(), card, out)
    return card
