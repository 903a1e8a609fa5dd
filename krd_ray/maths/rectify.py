"""Answers what the teacher should have said: logits and features with its bias to head classes taken out.

Does not run the teacher, estimate class means or compute a loss; temperature is never applied here.

Shapes: B batch, C classes, D teacher feature dimensions. Symbols as in docs/design.md, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from krd_ray.errors import ConfigError, DataError, ShapeError
from krd_ray.maths.priors import balanced_priors

FeatureForm = Literal["off", "teacher", "balanced", "class_mean", "prior", "mix"]
Gate = Literal["full", "constant", "by_count"]


@dataclass(frozen=True)
class Rectifier:
    """What a student asks of the teacher's raw outputs; hashable, travels with a request. Default: plain KD.

    Args:
        tau_prior: strength >= 0 of the prior taken off the logits; 1 turns a long-tailed posterior into a
            balanced one.
        exchange: where the rectified logits still miss the label, swap the label's with the largest.
        features: "off" sends none; "teacher" as they are, but centred and of unit length; "balanced" moves
            the class means to balanced places and keeps what varies within a class; "class_mean", "prior"
            and "mix" (of the feature and the class's prior) are the ablations.
        gate: how far class c moves: "full" (1), "constant" (gate_strength), "by_count" (more for rarer
            classes, up to gate_strength). Matters to "balanced" and "mix".
        gate_strength: in [0, 1].
        send_logits: False when only features are wanted.
    Raises:
        ConfigError: a value is out of range, or nothing would be sent.
    """

    tau_prior: float = 0.0
    exchange: bool = False
    features: FeatureForm = "off"
    gate: Gate = "full"
    gate_strength: float = 1.0
    send_logits: bool = True

    def __post_init__(self) -> None:
        forms, gates = get_args(FeatureForm), get_args(Gate)
        rules = (
            ("tau_prior", 0 <= self.tau_prior < math.inf, ">= 0 and finite", self.tau_prior),
            ("features", self.features in forms, f"one of {', '.join(forms)}", self.features),
            ("gate", self.gate in gates, f"one of {', '.join(gates)}", self.gate),
            ("gate_strength", 0 <= self.gate_strength <= 1, "in [0, 1]", self.gate_strength),
        )
        for name, holds, expected, got in rules:
            if not holds:
                raise ConfigError(f"rectifier.{name} must be {expected}, got {got!r}")
        if not self.send_logits and self.features == "off":
            raise ConfigError(
                "rectifier.send_logits is false and rectifier.features is off: nothing would be sent. "
                "Ask for one of them."
            )


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one pass of the teacher over the training shards leaves behind; all a rectifier needs to know.

    Build it with `from_means`. All tensors lie on one device.

    Attributes:
        class_counts: [C] int64, training samples per class, >= 1.
        class_means: [C, D] float32, raw mean feature of each class.
        priors: [C, D] float32, balanced category priors u_c, unit norm.
        centre: [D] float32, mean of the class means, each class weighing the same.
        mean_norm: [] float32, s: mean norm of the centred class means.
    """

    class_counts: Tensor
    class_means: Tensor
    priors: Tensor
    centre: Tensor
    mean_norm: Tensor

    @classmethod
    def from_means(cls, class_means: Tensor, class_counts: Tensor) -> Calibration:
        """Derive centre, norm and priors from raw class means [C, D] and training counts [C].

        Raises:
            ShapeError: the two disagree on C.
            DataError: a class has no training sample, or a mean is not finite.
        """
        means = class_means.detach().to(torch.float32)
        _check_calibration(means, class_counts)
        return cls._assemble(class_counts, means, balanced_priors(means - means.mean(dim=0)))

    @classmethod
    def from_dict(cls, tensors: dict[str, Tensor]) -> Calibration:
        """Back from `to_dict`; the priors are taken as stored, not searched again.

        Raises:
            DataError: a tensor is missing or a class has no training sample.
            ShapeError: the shapes disagree.
        """
        missing = {"class_counts", "class_means", "priors"} - tensors.keys()
        if missing:
            raise DataError(
                f"calibration lacks {', '.join(sorted(missing))}; it has "
                f"{', '.join(sorted(tensors)) or 'nothing'}. Calibrate the teacher again."
            )
        means, priors = tensors["class_means"], tensors["priors"]
        _check_calibration(means, tensors["class_counts"])
        if priors.shape != means.shape:
            raise ShapeError(f"priors have shape {tuple(priors.shape)}, class_means {tuple(means.shape)}.")
        return cls._assemble(tensors["class_counts"], means.to(torch.float32), priors.to(torch.float32))

    @classmethod
    def _assemble(cls, class_counts: Tensor, means: Tensor, priors: Tensor) -> Calibration:
        centre = means.mean(dim=0)
        mean_norm = (means - centre).norm(dim=1).mean()
        return cls(class_counts.to(means.device, torch.int64), means, priors, centre, mean_norm)

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors that cannot be derived again cheaply, for a safetensors file."""
        return {"class_counts": self.class_counts, "class_means": self.class_means, "priors": self.priors}

    def to(self, device: torch.device | str) -> Calibration:
        """A copy on `device`."""
        tensors = (self.class_counts, self.class_means, self.priors, self.centre, self.mean_norm)
        return Calibration(*(tensor.to(device) for tensor in tensors))


def log_class_prior(class_counts: Tensor) -> Tensor:
    """log pi_c = log(n_c / sum n).

    Args:
        class_counts: [C] integers >= 1.
    Returns:
        [C] float32, nats.
    Example:
        >>> log_class_prior(torch.tensor([3, 1])).exp()
        tensor([0.7500, 0.2500])
    """
    counts = class_counts.to(torch.float64)
    return (counts / counts.sum()).log().to(torch.float32)


def rectify_logits(
    logits: Tensor, labels: Tensor, log_prior: Tensor, *, tau_prior: float, exchange: bool
) -> Tensor:
    """Teacher logits without the label prior, and never in favour of a wrong class if `exchange`.

        z' = z - tau log pi;   then, where z'[y] < max z', swap z'[y] with the largest

    Args:
        logits: [B, C], any float dtype, temperature not applied.
        labels: [B] int64 in [0, C).
        log_prior: [C] log of the class prior, nats.
        tau_prior: >= 0; 0 leaves the prior in.
        exchange: swap where the label is not (or does not tie for) the largest.
    Returns:
        [B, C] float32; each row a permutation of z - tau log pi.
    Raises:
        ShapeError: logits, labels and prior disagree on B or C.
    Source: balanced label prior: post-hoc logit adjustment, Menon et al. (arXiv:2007.07314); exchange:
        knowledge adjustment by probability shift, Wen et al. (arXiv:1911.07471). Deviation: both applied to
        one teacher, prior first, on logits (this project's reading of LRD, arXiv:2409.07694).
    Example:
        >>> z = torch.tensor([[2.0, 1.0, 0.0]])
        >>> rectify_logits(z, torch.tensor([2]), torch.zeros(3), tau_prior=0.0, exchange=True)
        tensor([[0., 1., 2.]])
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or log_prior.shape != logits.shape[1:]:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}, log_prior "
            f"{tuple(log_prior.shape)}; expected [B, C], [B] and [C]."
        )
    z = logits.to(torch.float32)
    if tau_prior:
        z = z - tau_prior * log_prior.to(torch.float32)
    if not exchange:
        return z
    label_index = labels[:, None]
    largest, largest_index = z.max(dim=1, keepdim=True)
    at_label = z.gather(1, label_index)
    return z.scatter(1, largest_index, at_label).scatter(1, label_index, largest)


def class_gates(class_counts: Tensor, spec: Rectifier) -> Tensor:
    """g_c: how far each class moves to its balanced place, 0 (stays) to 1 (all the way).

        full: 1;   constant: a;   by_count: a (log n_max - log n_c) / (log n_max - log n_min)

    Args:
        class_counts: [C] integers >= 1.
        spec: its `gate` and `gate_strength` a.
    Returns:
        [C] float32 in [0, 1]. "by_count" with equal counts: a for every class, as the gate compares classes
        and none is more frequent than another.
    Example:
        >>> class_gates(torch.tensor([100, 10, 1]), Rectifier(gate="by_count"))
        tensor([0.0000, 0.5000, 1.0000])
    """
    strength = 1.0 if spec.gate == "full" else spec.gate_strength
    log_counts = class_counts.to(torch.float64).log()
    if spec.gate != "by_count":
        return torch.full_like(log_counts, strength, dtype=torch.float32)
    below_max = log_counts.max() - log_counts
    span = below_max.max()
    rarity = torch.where(span > 0, below_max / span, torch.ones_like(below_max))
    return (strength * rarity).to(torch.float32)


def balanced_means(calibration: Calibration, spec: Rectifier) -> Tensor:
    """m_c = (1 - g_c) mu_c + g_c s u_c: where each centred class mean moves.

    Args:
        calibration: class means and priors.
        spec: its gate.
    Returns:
        [C, D] float32.
    """
    gate = class_gates(calibration.class_counts, spec)[:, None]
    centred = calibration.class_means - calibration.centre
    return (1.0 - gate) * centred + gate * calibration.mean_norm * calibration.priors


def rectify_features(features: Tensor, labels: Tensor, calibration: Calibration, spec: Rectifier) -> Tensor:
    """The direction each sample's representation should have.

        f: feature minus centre;  mu: centred class means;  n(x) = x / |x|;  y: label
        teacher     n(f)
        balanced    n(m_y + (f - mu_y)),   m_c = (1 - g_c) mu_c + g_c s u_c
        class_mean  n(mu_y)
        prior       u_y
        mix         n((1 - g_y) n(f) + g_y u_y)

    Args:
        features: [B, D] raw teacher features, any float dtype.
        labels: [B] int64 in [0, C).
        calibration: on the features' device.
        spec: `features` chooses the form, `gate` and `gate_strength` set g.
    Returns:
        [B, D] float32, unit norm (zero where the vector to normalise is exactly zero).
    Raises:
        ShapeError: features, labels and calibration disagree on B or D.
        ConfigError: `spec.features` is "off".
    Source: this project's reading of RRD (arXiv:2409.07694), docs/design.md section 4.
    """
    means = calibration.class_means
    if features.ndim != 2 or labels.shape != features.shape[:1] or features.shape[1] != means.shape[1]:
        raise ShapeError(
            f"features have shape {tuple(features.shape)}, labels {tuple(labels.shape)}, class means "
            f"{tuple(means.shape)}; expected [B, D], [B], [C, D]. Was the calibration made by this teacher?"
        )
    if spec.features == "off":
        raise ConfigError("rectifier.features is off, but rectified features are asked for.")
    centred = features.to(torch.float32) - calibration.centre
    if spec.features == "teacher":
        return F.normalize(centred, dim=1)
    if spec.features == "class_mean":
        return F.normalize(means[labels] - calibration.centre, dim=1)
    if spec.features == "prior":
        return calibration.priors[labels]
    if spec.features == "mix":
        gate = class_gates(calibration.class_counts, spec)[labels, None]
        mixed = (1.0 - gate) * F.normalize(centred, dim=1) + gate * calibration.priors[labels]
        return F.normalize(mixed, dim=1)
    shift = balanced_means(calibration, spec) - (means - calibration.centre)
    return F.normalize(centred + shift[labels], dim=1)


def _check_calibration(means: Tensor, class_counts: Tensor) -> None:
    if means.ndim != 2 or class_counts.shape != means.shape[:1]:
        raise ShapeError(
            f"class_means have shape {tuple(means.shape)}, class_counts {tuple(class_counts.shape)}; "
            "expected [C, D] and [C]."
        )
    empty = (class_counts < 1).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"{len(empty)} of {len(class_counts)} classes have no training sample (first: class {empty[0]}), "
            "so they have no mean feature. Leave them out of the class list or add a sample."
        )
