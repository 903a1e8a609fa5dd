"""Answers which losses there are, what each needs, which settings it takes and where it comes from.

Does not hold formulas (`classification`, `distillation`, `class_groups`, `listwise` and `rectified_terms` do), and
does not weigh or add terms (`train.objective` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from krd_ray.maths.class_groups import dkd, ltkd
from krd_ray.maths.classification import balanced_softmax, class_balanced, cross_entropy, focal, ldam
from krd_ray.maths.distillation import bkd, cckd, dive, kd, knowledge_adjustment
from krd_ray.maths.listwise import pld
from krd_ray.maths.rectified_terms import lrd, nd, rrd

TENSORS = frozenset(
    {
        "student_logits",
        "labels",
        "class_counts",
        "class_weights",
        "teacher_logits",
        "rectified_logits",
        "projected_features",
        "rectified_features",
    }
)


@dataclass(frozen=True)
class LossRecord:
    """One named loss, called by keyword with the tensors of `needs` and the settings of `params`.

    Fields: fn, the function; needs, names of its tensors, out of `TENSORS`; params, names of its settings, which are
    fields of the config section; source, the paper.
    """

    fn: Callable[..., Tensor]
    needs: frozenset[str]
    params: tuple[str, ...]
    source: str


_LABELS = frozenset({"student_logits", "labels", "class_weights"})
_LOGITS = frozenset({"student_logits", "teacher_logits"})
_FEATURES = frozenset({"projected_features", "rectified_features"})

# The keys are the values of loss.classification.name.
CLASSIFICATION_LOSSES: dict[str, LossRecord] = {
    "cross_entropy": LossRecord(cross_entropy, _LABELS, (), "maximum likelihood"),
    "balanced_softmax": LossRecord(
        balanced_softmax, _LABELS | {"class_counts"}, ("tau",), "arXiv:2007.10740, arXiv:2007.07314"
    ),
    "class_balanced": LossRecord(class_balanced, _LABELS | {"class_counts"}, ("beta",), "arXiv:1901.05555"),
    "focal": LossRecord(focal, _LABELS, ("gamma",), "arXiv:1708.02002"),
    "ldam": LossRecord(ldam, _LABELS | {"class_counts"}, ("max_margin", "scale"), "arXiv:1906.07413"),
}

# The keys are the names of the config's sections below loss.
DISTILLATION_TERMS: dict[str, LossRecord] = {
    "kd": LossRecord(kd, _LOGITS, ("temperature",), "arXiv:1503.02531"),
    "dkd": LossRecord(dkd, _LOGITS | {"labels"}, ("temperature", "alpha", "beta"), "arXiv:2203.08679"),
    "bkd": LossRecord(bkd, _LOGITS | {"class_counts"}, ("temperature", "beta"), "arXiv:2104.10510"),
    "ltkd": LossRecord(
        ltkd, _LOGITS | {"class_counts"}, ("temperature", "alpha", "beta"), "arXiv:2506.18496"
    ),
    "dive": LossRecord(dive, _LOGITS, ("temperature", "power"), "arXiv:2103.15042"),
    "cckd": LossRecord(cckd, _LOGITS | {"labels"}, ("temperature",), "arXiv:2107.06993"),
    "nd": LossRecord(nd, _FEATURES, (), "arXiv:2305.17007"),
    "pld": LossRecord(pld, _LOGITS | {"labels"}, ("temperature",), "arXiv:2506.12542"),
    "knowledge_adjustment": LossRecord(
        knowledge_adjustment, _LOGITS | {"labels"}, ("temperature",), "arXiv:1911.07471"
    ),
    "rrd": LossRecord(rrd, _FEATURES, ("form",), "arXiv:2409.07694"),
    "lrd": LossRecord(
        lrd,
        frozenset({"student_logits", "rectified_logits", "labels", "class_counts"}),
        ("temperature", "tau_prior", "space", "weighting", "beta", "gate"),
        "arXiv:2409.07694",
    ),
}
