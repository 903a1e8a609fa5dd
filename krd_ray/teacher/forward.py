"""Answers what the teacher says about images: views, one forward in a fixed shape, float16 rows.

Does not remember anything (the store does) and does not rectify.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from krd_ray.errors import TeacherError
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import ViewSpec, eval_view, train_view
from krd_ray.teacher.recorded import Compile, record_forward
from krd_ray.teacher.store import IntArray, RowArray
from krd_ray.teacher.weights import ModelCard


class TeacherForward:
    """A frozen teacher on one device.

    Every forward has exactly `micro_batch` rows, the last one padded with zeros: shapes never change, so a row's
    value does not depend on how many other rows were asked for.

    Args:
        model: returns (logits, features).
        card: what the weights say of themselves; its mean and std win over the view's.
        view: what the students see.
        device: where to compute.
        bf16: autocast to bfloat16.
        micro_batch: rows of a forward.
        compile: as `record_forward`.
    Raises:
        TeacherError: as `record_forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard | None,
        view: ViewSpec,
        *,
        device: torch.device,
        bf16: bool,
        micro_batch: int,
        compile: Compile = "off",
    ) -> None:
        self._model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._view = replace(view, mean=card.mean, std=card.std) if card else view
        self._device, self._bf16, self._micro_batch = device, bf16, micro_batch
        self._fixed = record_forward(self._forward, (micro_batch, 3, view.side, view.side), device, compile)

    @torch.inference_mode()
    def __call__(self, images: npt.NDArray[np.uint8], sample_ids: IntArray, view_index: IntArray) -> RowArray:
        """Returns logits and features side by side for training views, float16 [n, C + D].

        Raises:
            TeacherError: an output is not finite in float16, with the sample id.
        """
        drawn = (images, sample_ids, view_index)
        pixels, ids, index = (on_device(each, self._device) for each in drawn)
        view = train_view(pixels, ids, index, self._view)
        logits, features = self._run(view)
        rows = torch.cat([logits, features], dim=1).to(torch.float16).cpu()
        bad = ~torch.isfinite(rows).all(dim=1)
        if bad.any():
            raise TeacherError(
                f"the teacher's output for sample {sample_ids[bad.numpy()][0]} is not finite in float16; "
                "check its weights and the normalisation of its inputs"
            )
        return rows.numpy()

    @torch.inference_mode()
    def on_eval_view(self, images: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Returns float32 logits [n, C] and features [n, D] for images without augmentation, on the CPU."""
        logits, features = self._run(eval_view(on_device(images, self._device), self._view))
        return logits.cpu(), features.cpu()

    def _run(self, view_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._run_fixed(part) for part in view_BCHW.split(self._micro_batch)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _run_fixed(self, view_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        num_rows = len(view_BCHW)
        padding = (0, 0, 0, 0, 0, 0, 0, self._micro_batch - num_rows)
        padded = functional.pad(view_BCHW, padding).contiguous(memory_format=torch.channels_last)
        logits, features = self._fixed(padded)
        return logits[:num_rows], features[:num_rows]

    def _forward(self, padded_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits, features = self._model(padded_BCHW)
        return logits.float(), features.float()
