"""Answers what a rectifier must know of a teacher: its class means, and balanced priors of the kind asked for.

Does not run the teacher (`teacher/calibrate.py` sums its features) or rectify anything (`rectify.py` does).

Shapes: C classes, D teacher feature dimensions. Symbols as in docs/design.md, section 4.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from krd_ray.errors import DataError, ShapeError
from krd_ray.maths.priors import PriorKind, balanced_priors, resolve_prior


def _one_lock_per_kind() -> dict[PriorKind, threading.Lock]:
    return {kind: threading.Lock() for kind in get_args(PriorKind)}


@dataclass(frozen=True, eq=False)
class Calibration:
    """What one pass of the teacher over the training shards leaves behind; all a rectifier needs to know.

    Build it with `from_means`. All tensors lie on one device. May be used by many threads at once.

    Attributes:
        class_counts: [C] int64, training samples per class, >= 1.
        class_means: [C, D] float32, raw mean feature of each class.
        priors: [C, D] float32, balanced category priors u_c of kind "auto", unit norm. Other kinds: `priors_of`.
        centre: [D] float32, mean of the class means, each class weighing the same.
        mean_norm: [] float32, s: mean norm of the centred class means.
    """

    class_counts: Tensor
    class_means: Tensor
    priors: Tensor
    centre: Tensor
    mean_norm: Tensor
    _found: dict[PriorKind, Tensor] = field(default_factory=dict, repr=False)
    _locks: dict[PriorKind, threading.Lock] = field(
        default_factory=_one_lock_per_kind, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self._found.setdefault(resolve_prior("auto", *self.class_means.shape), self.priors)

    @classmethod
    def from_means(cls, class_means: Tensor, class_counts: Tensor) -> Calibration:
        """Derive centre, norm and priors from raw class means [C, D] and training counts [C].

        Raises:
            ShapeError: the two disagree on C.
            DataError: a class has no training sample, or a mean is not finite.
        Example:
            >>> calibration = Calibration.from_means(torch.eye(3), torch.tensor([5, 2, 1]))
            >>> (calibration.priors @ calibration.priors.T)[0].round(decimals=4)
            tensor([ 1.0000, -0.5000, -0.5000])
        """
        means = class_means.detach().to(torch.float32)
        _check_calibration(means, class_counts)
        return cls._assemble(class_counts, means, balanced_priors(means - means.mean(dim=0)))

    @classmethod
    def from_dict(cls, tensors: dict[str, Tensor]) -> Calibration:
        """Back from `to_dict`; the priors of kind "auto" are taken as stored, not searched again.

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

    def priors_of(self, kind: PriorKind) -> Tensor:
        """Balanced category priors of one kind: computed when first asked for, then kept.

        A thread that asks while another computes the same kind waits for it; other kinds do not wait. The result
        depends on the class means alone, so replicas that hold the same means hold the same priors.

        Args:
            kind: as in `balanced_priors`.
        Returns:
            [C, D] float32 on the class means' device, unit norm; the same tensor each time.
        Raises:
            ConfigError: a simplex does not fit into D dimensions.
            DataError: (class_mean) a class mean has no direction.
        """
        kind = resolve_prior(kind, *self.class_means.shape)
        with self._locks[kind]:
            if kind not in self._found:
                self._found[kind] = balanced_priors(self.class_means - self.centre, kind)
            return self._found[kind]

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors from which everything else follows, for a safetensors file; "auto" priors, no other kind."""
        return {"class_counts": self.class_counts, "class_means": self.class_means, "priors": self.priors}

    def to(self, device: torch.device | str) -> Calibration:
        """A copy on `device`, with the priors found so far."""
        counts, means, priors, centre, mean_norm = (tensor.to(device) for tensor in self._tensors())
        found = {kind: other.to(device) for kind, other in dict(self._found).items()}
        return Calibration(counts, means, priors, centre, mean_norm, found)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the tensors, not the locks."""
        return Calibration, (*self._tensors(), dict(self._found))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.class_counts, self.class_means, self.priors, self.centre, self.mean_norm


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
