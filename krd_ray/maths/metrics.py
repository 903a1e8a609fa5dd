"""Answers how good predictions are on a long-tailed problem: counts that add up over batches and ranks.

Does not talk to other ranks or keep state between epochs: add the counts, reduce one vector, divide once.

Shapes: B batch, C classes, K = 15 confidence bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ShapeError
from krd_ray.maths.longtail import shot_groups

NUM_BINS = 15


@dataclass(frozen=True, eq=False)
class EvalCounts:
    """Everything the metrics need, as sums over samples; `a + b` is the counts of both.

    Build it with `count_batch` or `EvalCounts.zeros`. All tensors lie on one device.

    Attributes:
        correct_C, total_C: [C] int64, samples by true class.
        bin_correct_K, bin_total_K: [K] int64, samples by confidence; bin k is [k / K, (k + 1) / K), the last
            one closed.
        bin_confidence_K: [K] float64, sum of the largest probabilities.
        loss_sum: [] float64, sum of the samples' cross entropy, nats.
        num_agree, num_compared: [] int64, samples with the teacher's top class, and samples compared at all.
    """

    correct_C: Tensor
    total_C: Tensor
    bin_correct_K: Tensor
    bin_total_K: Tensor
    bin_confidence_K: Tensor
    loss_sum: Tensor
    num_agree: Tensor
    num_compared: Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device | str = "cpu") -> EvalCounts:
        """The counts of no sample."""
        return cls.from_tensor(torch.zeros(2 * num_classes + 3 * NUM_BINS + 3, device=device))

    def __add__(self, other: EvalCounts) -> EvalCounts:
        if self.total_C.shape != other.total_C.shape:
            raise ShapeError(
                f"counts over {len(self.total_C)} and over {len(other.total_C)} classes cannot be added. "
                "Count both with the same num_classes."
            )
        return EvalCounts(
            *(mine + theirs for mine, theirs in zip(self._fields(), other._fields(), strict=True))
        )

    def to_tensor(self) -> Tensor:
        """[2 C + 3 K + 3] float64: one vector for one all_reduce(SUM); integers stay exact below 2^53."""
        return torch.cat([field.reshape(-1).to(torch.float64) for field in self._fields()])

    @classmethod
    def from_tensor(cls, vector: Tensor) -> EvalCounts:
        """Back from `to_tensor`.

        Raises:
            ShapeError: the vector's length fits no number of classes.
        """
        num_classes, rest = divmod(vector.numel() - 3 * NUM_BINS - 3, 2)
        if vector.ndim != 1 or num_classes < 1 or rest:
            raise ShapeError(
                f"a vector of counts has 2 C + {3 * NUM_BINS + 3} entries, got shape {tuple(vector.shape)}."
            )
        sizes = [num_classes, num_classes, NUM_BINS, NUM_BINS, NUM_BINS, 1, 1, 1]
        parts = torch.split(vector.to(torch.float64), sizes)
        integers = [part.round().to(torch.int64) for part in parts]
        return cls(
            correct_C=integers[0],
            total_C=integers[1],
            bin_correct_K=integers[2],
            bin_total_K=integers[3],
            bin_confidence_K=parts[4],
            loss_sum=parts[5].reshape(()),
            num_agree=integers[6].reshape(()),
            num_compared=integers[7].reshape(()),
        )

    def per_class_accuracy(self) -> list[float | None]:
        """Accuracy of each class in [0, 1]; None for a class without samples."""
        pairs = zip(self.correct_C.tolist(), self.total_C.tolist(), strict=True)
        return [correct / total if total else None for correct, total in pairs]

    def metrics(self, class_counts: Tensor) -> dict[str, float | None]:
        """The project's metrics, each a fraction in [0, 1] unless it says otherwise.

        Args:
            class_counts: [C] integers, training samples per class; decides the shot groups.
        Returns:
            top1: correct / all samples.
            many, medium, few: correct / samples of the group's classes, pooled over samples (on a balanced
                split the same as the mean over its classes).
            balanced: mean accuracy over classes; worst_class: the smallest; harmonic_mean: C / sum_c 1 / a_c,
                0 if any is 0. Classes without samples are left out of all three.
            ece: expected calibration error, sum_k |correct_k - confidence_k| / samples, 15 equal bins.
            loss: mean cross entropy, nats. num_samples: how many.
            agreement: samples where the top class is the teacher's; only if teacher logits were counted.
            None where there is no sample to divide by.
        Raises:
            ShapeError: class_counts has another number of classes.
        Source: many / medium / few: Liu et al. (arXiv:1904.05160); ECE: Guo et al. (arXiv:1706.04599).
        """
        if class_counts.shape != self.total_C.shape:
            raise ShapeError(
                f"class_counts has shape {tuple(class_counts.shape)}, but {len(self.total_C)} classes were "
                "counted."
            )
        num_samples = int(self.total_C.sum())
        gaps = (self.bin_correct_K.to(torch.float64) - self.bin_confidence_K).abs()
        rows: dict[str, float | None] = {"top1": _ratio(self.correct_C.sum(), num_samples)}
        for group, mask in shot_groups(class_counts.cpu().numpy()).items():
            chosen = torch.from_numpy(mask).to(self.total_C.device)
            rows[group] = _ratio(self.correct_C[chosen].sum(), int(self.total_C[chosen].sum()))
        rows |= _over_classes([value for value in self.per_class_accuracy() if value is not None])
        rows |= {"ece": _ratio(gaps.sum(), num_samples), "loss": _ratio(self.loss_sum, num_samples)}
        if int(self.num_compared):
            rows["agreement"] = _ratio(self.num_agree, int(self.num_compared))
        return rows | {"num_samples": num_samples}

    def _fields(self) -> tuple[Tensor, ...]:
        """Every tensor, in the order of the constructor and of the flat vector."""
        classes = (self.correct_C, self.total_C)
        bins = (self.bin_correct_K, self.bin_total_K, self.bin_confidence_K)
        return (*classes, *bins, self.loss_sum, self.num_agree, self.num_compared)


def count_batch(
    logits: Tensor, labels: Tensor, num_classes: int, teacher_logits: Tensor | None = None
) -> EvalCounts:
    """Count one batch of predictions.

    Args:
        logits: [B, C], any float dtype.
        labels: [B] int64 in [0, C).
        num_classes: C.
        teacher_logits: [B, C], counts agreement if given.
    Returns:
        The batch's counts, on the logits' device; nothing is copied to the host.
    Raises:
        ShapeError: shapes disagree.
    Example:
        >>> counts = count_batch(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), 2)
        >>> counts.metrics(torch.tensor([150, 10]))["top1"]
        0.5
    """
    _check_shapes(logits, labels, num_classes, teacher_logits)
    log_p = F.log_softmax(logits.detach().to(torch.float32), dim=1)
    log_confidence, predicted = log_p.max(dim=1)
    confidence, correct = log_confidence.exp(), (predicted == labels).to(torch.int64)
    edges = torch.linspace(0, 1, NUM_BINS + 1, device=logits.device)[1:-1]
    bins = torch.bucketize(confidence, edges, right=True)
    if teacher_logits is None:
        num_agree = num_compared = torch.zeros((), dtype=torch.int64, device=logits.device)
    else:
        agrees = predicted == teacher_logits.argmax(dim=1)
        num_agree, num_compared = agrees.sum(), torch.full_like(agrees, True).sum()
    return EvalCounts(
        correct_C=_sum_by(labels, correct, num_classes),
        total_C=_sum_by(labels, torch.ones_like(correct), num_classes),
        bin_correct_K=_sum_by(bins, correct, NUM_BINS),
        bin_total_K=_sum_by(bins, torch.ones_like(correct), NUM_BINS),
        bin_confidence_K=_sum_by(bins, confidence.to(torch.float64), NUM_BINS),
        loss_sum=-log_p.gather(1, labels[:, None]).to(torch.float64).sum(),
        num_agree=num_agree,
        num_compared=num_compared,
    )


def _sum_by(index: Tensor, values: Tensor, num_slots: int) -> Tensor:
    return values.new_zeros(num_slots).index_add_(0, index, values)


def _ratio(numerator: Tensor, denominator: int) -> float | None:
    return float(numerator) / denominator if denominator else None


def _over_classes(accuracies: list[float]) -> dict[str, float | None]:
    """Macro metrics over the classes that have samples."""
    if not accuracies:
        return dict.fromkeys(("balanced", "worst_class", "harmonic_mean"))
    worst, num_classes = min(accuracies), len(accuracies)
    harmonic = num_classes / sum(1.0 / value for value in accuracies) if worst > 0 else 0.0
    return {"balanced": sum(accuracies) / num_classes, "worst_class": worst, "harmonic_mean": harmonic}


def _check_shapes(logits: Tensor, labels: Tensor, num_classes: int, teacher_logits: Tensor | None) -> None:
    if logits.ndim != 2 or logits.shape[1] != num_classes or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; expected "
            f"[B, {num_classes}] and [B]. Does the model have as many outputs as the dataset has classes?"
        )
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ShapeError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)}, logits {tuple(logits.shape)}; "
            "expected [B, C] for both."
        )
