"""Answers how raw outputs become the soft targets a student asked for: checked, rectified, in float16.

Does not compute or keep raw outputs; a served teacher, one inside a student and a store on disk share this file.
"""

from __future__ import annotations

import numpy as np
import torch

from krd_ray.errors import TeacherError
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.priors import PriorKind
from krd_ray.maths.rectify import log_class_prior, rectify_features, rectify_logits, to_float16
from krd_ray.teacher.messages import Float16Array, SoftTargets, TargetRequest
from krd_ray.teacher.store import RowArray

LENGTH_REMEDY = "loss.rrd.form: norm_aware and loss.nd keep the teacher's length: take cosine, leave nd out."
PRIOR_REMEDY = "loss.lrd.tau_prior adds tau_prior * |log pi| to them: lower it."


class Answers:
    """Rectifies the raw outputs of one teacher.

    Args:
        teacher_hash: who answers; a question to another teacher is refused.
        class_counts: n_c of the training split.
        incarnation: how often the answering process had been restarted.
        priors: kinds of balanced priors to find as soon as there is a calibration.
    """

    def __init__(
        self,
        teacher_hash: str,
        class_counts: tuple[int, ...],
        *,
        incarnation: int,
        priors: tuple[PriorKind, ...] = (),
    ) -> None:
        self._hash, self._num_classes, self._incarnation = teacher_hash, len(class_counts), incarnation
        self._log_prior = log_class_prior(torch.tensor(class_counts))
        self._priors = priors
        self._calibration: Calibration | None = None

    def calibrate(self, calibration: Calibration) -> None:
        """Takes over the class means, and finds the balanced priors that will be asked for.

        Raises:
            DataError: priors of kind "class_mean", and a class mean has no direction.
        """
        for kind in self._priors:
            calibration.priors_of(kind)
        self._calibration = calibration

    def check(self, request: TargetRequest) -> None:
        """Refuses a question that this teacher cannot answer.

        Raises:
            TeacherError: another teacher is meant, ids and views are not as many, or features before calibration.
        """
        if request.teacher_hash != self._hash:
            raise TeacherError(
                f"student {request.student} asked teacher {request.teacher_hash}, this is {self._hash}; "
                "weights, preprocessing or view settings changed under a running job: start the run again"
            )
        if request.view_index.shape != request.sample_ids.shape:
            raise TeacherError(
                f"student {request.student} asked for {request.sample_ids.shape} samples in "
                f"{request.view_index.shape} views; one view index per sample is expected"
            )
        if request.rectifier.features != "off" and self._calibration is None:
            raise TeacherError("features were asked for before the calibration pass; call calibrate first")

    def make(self, rows: RowArray, request: TargetRequest) -> SoftTargets:
        """Returns rectified soft targets of raw outputs, float16 [B, C + D], in the request's order.

        Raises:
            TeacherError: a rectified value does not fit into float16.
            ConfigError: the rectifier's kind of prior does not fit the teacher's features.
        """
        spec = request.rectifier
        labels = torch.from_numpy(np.array(request.labels))
        raw = torch.from_numpy(rows)
        logits = features = None
        if spec.send_logits:
            logits = self._logits(raw[:, : self._num_classes], labels, request)
        if spec.features != "off":
            assert self._calibration is not None
            rectified = rectify_features(raw[:, self._num_classes :].float(), labels, self._calibration, spec)
            features = to_float16(rectified, request.sample_ids, "features", LENGTH_REMEDY).numpy()
        return SoftTargets(
            request.sample_ids, logits, features, request.rectifier, self._hash, self._incarnation
        )

    def _logits(self, raw: torch.Tensor, labels: torch.Tensor, request: TargetRequest) -> Float16Array:
        """Rectified logits as float16; untouched bytes when nothing is to be rectified."""
        spec = request.rectifier
        if spec.tau_prior == 0 and not spec.exchange:
            return raw.contiguous().numpy()
        logits = rectify_logits(
            raw.float(), labels, self._log_prior, tau_prior=spec.tau_prior, exchange=spec.exchange
        )
        return to_float16(logits, request.sample_ids, "logits", PRIOR_REMEDY).numpy()
