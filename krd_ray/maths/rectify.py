"""Answers what the teacher should have said: logits and features with its bias to head classes taken out.

Does not run the teacher, estimate class means (`calibration.py` keeps them) or compute a loss; temperature is never
applied here.

Shapes: B batch, C classes, D teacher feature dimensions. Symbols as in docs/design.md, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from krd_ray.errors import ConfigError, ShapeError, TeacherError
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.priors import PriorKind

FeatureForm = Literal["off", "teacher", "balanced", "class_mean", "prior", "mix", "class_direction"]
Gate = Literal["full", "constant", "by_count"]
Length = Literal["unit", "teacher"]
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rectifier:
    """What a student asks of the teacher's raw outputs; hashable, travels with a request. Default: plain KD.

    Args:
        tau_prior: strength >= 0 of the prior taken off the logits; 1 turns a long-tailed posterior into a
            balanced one.
        exchange: where the rectified logits still miss the label, swap the label's with the largest.
        features: "off" sends none; "teacher" as they are, but centred; "balanced" moves the class means to
            balanced places and keeps what varies within a class; "class_mean", "prior" and "mix" (of the feature
            and the class's prior) are the ablations; "class_direction" is the class mean without centring.
        prior: the balanced places: "auto", "simplex", "sphere" or "class_mean", see `balanced_priors`. Matters to
            "balanced", "prior" and "mix".
        gate: how far class c moves: "full" (1), "constant" (gate_strength), "by_count" (more for rarer
            classes, up to gate_strength). Matters to "balanced" and "mix".
        gate_strength: in [0, 1].
        length: of the features sent: "unit", or "teacher", that of the teacher's own feature.
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
    prior: PriorKind = "auto"
    length: Length = "unit"

    def __post_init__(self) -> None:
        choices = {"features": FeatureForm, "prior": PriorKind, "gate": Gate, "length": Length}
        named = ((name, getattr(self, name), get_args(kind)) for name, kind in choices.items())
        rules = (
            ("tau_prior", 0 <= self.tau_prior < math.inf, ">= 0 and finite", self.tau_prior),
            ("gate_strength", 0 <= self.gate_strength <= 1, "in [0, 1]", self.gate_strength),
            *((name, got in allowed, f"one of {', '.join(allowed)}", got) for name, got, allowed in named),
        )
        for name, holds, expected, got in rules:
            if not holds:
                raise ConfigError(f"rectifier.{name} must be {expected}, got {got!r}")
        if not self.send_logits and self.features == "off":
            raise ConfigError(
                "rectifier.send_logits is false and rectifier.features is off: nothing would be sent. "
                "Ask for one of them."
            )


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


def balanced_means(calibration: Calibration, spec: Rectifier, classes: Tensor) -> Tensor:
    """m_c = (1 - g_c) mu_c + g_c s u_c: where the centred means of some classes move.

    Args:
        calibration: class means and priors.
        spec: its gate and its kind of prior.
        classes: [N] int64 in [0, C), repeats allowed.
    Returns:
        [N, D] float32, row n for class classes[n].
    """
    gate = class_gates(calibration.class_counts, spec)[classes, None]
    centred = calibration.class_means[classes] - calibration.centre
    return (1.0 - gate) * centred + gate * calibration.mean_norm * calibration.priors_of(spec.prior)[classes]


def rectify_features(features: Tensor, labels: Tensor, calibration: Calibration, spec: Rectifier) -> Tensor:
    """The representation that each sample should have: a direction, times 1 or the teacher's own length.

        x: feature;  f: x minus centre;  mu: centred class means;  n(v) = v / |v|;  y: label;  u: `prior`

        form                direction                                 length "teacher"
        teacher             n(f)                                      |f|
        balanced            n(m_y + (f - mu_y))                       |f|
        class_mean          n(mu_y)                                   |f|
        prior               u_y                                       |f|
        mix                 n((1 - g_y) n(f) + g_y u_y)               |f|
        class_direction     n(centre + mu_y)                          |x|

        m_c = (1 - g_c) mu_c + g_c s u_c

    With the gate closed (g = 0) "balanced" and "mix" are "teacher".

    Args:
        features: [B, D] raw teacher features, any float dtype.
        labels: [B] int64 in [0, C).
        calibration: on the features' device.
        spec: `features` chooses the form, `prior` sets u, `gate` and `gate_strength` set g, `length` the length.
    Returns:
        [B, D] float32, of norm 1 or |f| or |x|; zero where the vector to normalise is exactly zero.
    Raises:
        ShapeError: features, labels and calibration disagree on B or D.
        ConfigError: `spec.features` is "off", or the simplex that `spec` asks for does not fit into D dimensions.
        DataError: priors of kind "class_mean", and a class mean has no direction.
    Source: this project's reading of RRD (arXiv:2409.07694), docs/design.md section 4; class_direction: ND
        (arXiv:2305.17007), whose student turns towards the teacher's own, uncentred class mean.
    Example:
        >>> calibration = Calibration.from_means(torch.eye(3), torch.tensor([5, 2, 1]))
        >>> x, y = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([2])
        >>> rectify_features(x, y, calibration, Rectifier(features="class_direction", length="teacher"))
        tensor([[0., 0., 5.]])
    """
    means = calibration.class_means
    if features.ndim != 2 or labels.shape != features.shape[:1] or features.shape[1] != means.shape[1]:
        raise ShapeError(
            f"features have shape {tuple(features.shape)}, labels {tuple(labels.shape)}, class means "
            f"{tuple(means.shape)}; expected [B, D], [B], [C, D]. Was the calibration made by this teacher?"
        )
    if spec.features == "off":
        raise ConfigError("rectifier.features is off, but rectified features are asked for.")
    features = features.to(torch.float32)
    centred = features - calibration.centre
    direction = F.normalize(_towards(centred, labels, calibration, spec), dim=1)
    if spec.length == "unit":
        return direction
    made_from = features if spec.features == "class_direction" else centred
    length: Tensor = made_from.norm(dim=1, keepdim=True)
    return direction * length


def _towards(centred: Tensor, labels: Tensor, calibration: Calibration, spec: Rectifier) -> Tensor:
    """[B, D] vectors in the directions that `rectify_features` promises, of any length."""
    if spec.features == "teacher":
        return centred
    if spec.features == "class_direction":
        return calibration.class_means[labels]
    if spec.features == "prior":
        return calibration.priors_of(spec.prior)[labels]
    if spec.features == "mix":
        gate = class_gates(calibration.class_counts, spec)[labels, None]
        return (1.0 - gate) * F.normalize(centred, dim=1) + gate * calibration.priors_of(spec.prior)[labels]
    own = calibration.class_means[labels] - calibration.centre
    if spec.features == "class_mean":
        return own
    return centred + (balanced_means(calibration, spec, labels) - own)


def to_float16(values: Tensor, sample_ids: NDArray[np.int64], what: str, remedy: str) -> Tensor:
    """Rectified rows as they travel, refused where float16 would turn a number into infinity.

    Args:
        values: [B, K], finite.
        sample_ids: [B] int64, for the message.
        what: "features" or "logits", for the message.
        remedy: what the person can change, for the message.
    Returns:
        [B, K] float16, finite.
    Raises:
        TeacherError: a value is beyond 65504; with the sample and its length.
    Example:
        >>> to_float16(torch.tensor([[3e4, 6e4]]), np.array([107]), "features", "Ask for unit length.")
        tensor([[30000., 60000.]], dtype=torch.float16)
    """
    rows = values.to(torch.float16)
    if len(rows) and not rows.abs().amax() <= FLOAT16_MAX:
        first = int((~rows.isfinite().all(dim=1)).nonzero()[0, 0])
        raise TeacherError(
            f"the rectified {what} of sample {sample_ids[first]} have length {values[first].norm():.1f}, with a "
            f"value of {values[first].abs().max():.1f}; answers travel as float16, which ends at "
            f"{FLOAT16_MAX:.0f}. {remedy}"
        )
    return rows
