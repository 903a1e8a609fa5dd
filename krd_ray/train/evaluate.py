"""Answers how good a model is on a split, and how quick: predictions, integer counts, metrics, latency.

Does not choose models and does not train. The test split is read once, by `evaluate_models`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from krd_ray.data.shard_set import ShardSet
from krd_ray.data.stream import eval_batches
from krd_ray.maths.metrics import EvalCounts, count_batch
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import ViewSpec, eval_view
from krd_ray.models.model_cost import latency_conditions, measure_latency_ms
from krd_ray.models.registry import build_model, describe_model
from krd_ray.teacher.weights import load_model


@torch.inference_mode()
def run_split(
    net: nn.Module,
    shards: ShardSet,
    view: ViewSpec,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (logits float32 [B, C], labels int64 [B]) on the CPU for this rank's part, without augmentation."""
    net.eval()
    for batch in eval_batches(shards, batch_size=batch_size, rank=rank, world=world):
        images = on_device(batch.images_BHWC, device)
        logits, _ = net(eval_view(images, view))
        yield logits.float().cpu(), torch.from_numpy(batch.labels)


def count_split(
    predictions: Iterator[tuple[Tensor, Tensor]], num_classes: int, teacher_logits: Tensor | None = None
) -> EvalCounts:
    """Adds up the counts of a split; `teacher_logits` [N, C] in the same order also counts agreement."""
    total, row = EvalCounts.zeros(num_classes), 0
    for logits, labels in predictions:
        teacher = None if teacher_logits is None else teacher_logits[row : row + len(labels)]
        total = total + count_batch(logits, labels, num_classes, teacher)
        row += len(labels)
    return total


def evaluate_models(
    models: dict[str, dict[str, Any]],
    shards: ShardSet,
    view: ViewSpec,
    class_counts: tuple[int, ...],
    *,
    teacher: str | None,
    device: str,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Evaluates several models on one split in one process.

    Args:
        models: name -> {"weights": path, "model": registry name or None}.
        shards: the split.
        view: as in training; each model's own mean and std win.
        class_counts: n_c of the training split, for the groups.
        teacher: the name whose predictions the others' agreement is counted against; None for no teacher.
        device: `cpu` or `cuda`, as reserved.
        batch_size: rows of a forward.
    Returns:
        name -> model, num_params, num_flops, metrics, per_class_accuracy.
    """
    results: dict[str, Any] = {}
    teacher_logits: Tensor | None = None
    for name in sorted(models, key=lambda name: name != teacher):
        net, model_name, own_view = _load(models[name], view, len(class_counts))
        at = torch.device(device)
        predictions = list(run_split(net.to(at), shards, own_view, batch_size=batch_size, device=at))
        counts = count_split(iter(predictions), len(class_counts), teacher_logits)
        if name == teacher:
            teacher_logits = torch.cat([logits for logits, _ in predictions])
        results[name] = {
            **_describe(model_name, view, len(class_counts)),
            "role": "teacher" if name == teacher else "student",
            "metrics": counts.metrics(torch.tensor(class_counts)),
            "per_class_accuracy": counts.per_class_accuracy(),
        }
    return results


def evaluate_and_time(
    models: dict[str, dict[str, Any]],
    shards: ShardSet,
    view: ViewSpec,
    class_counts: tuple[int, ...],
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates several models on one split and times each kind of model once on one CPU thread.

    Args:
        models, shards, view, class_counts, settings: as for `evaluate_models`.
    Returns:
        models: as from `evaluate_models`, each with `latency_ms`; latency: the conditions it was measured under.
    """
    results = evaluate_models(models, shards, view, class_counts, **settings)
    names = dict.fromkeys(entry["model"] for entry in results.values())
    nets = {
        name: build_model(name, num_classes=len(class_counts), image_size=view.side, seed=0) for name in names
    }
    latency_ms = measure_latency_ms(nets, image_size=view.side)
    timed = {name: {**entry, "latency_ms": latency_ms[entry["model"]]} for name, entry in results.items()}
    return {"latency": latency_conditions(), "models": timed}


def _load(entry: dict[str, Any], view: ViewSpec, num_classes: int) -> tuple[nn.Module, str, ViewSpec]:
    """The model of a weights file, its name, and the view in the normalisation it was trained with."""
    net, card = load_model(
        entry["weights"], model=entry["model"], num_classes=num_classes, image_size=view.side
    )
    name = entry["model"] or (card.model if card else "")
    return net, name, replace(view, mean=card.mean, std=card.std) if card else view


def _describe(name: str, view: ViewSpec, num_classes: int) -> dict[str, Any]:
    info = describe_model(name, num_classes=num_classes, image_size=view.side)
    return {"model": name, "num_params": info.num_params, "num_flops": info.num_flops}
