"""Answers how one student learns from the batches that its worker is given: step, validation, checkpoint, export.

Does not read batches and does not ask the teacher (`loop` does): several students of one process are given the same
view and answers of the teacher, and each keeps its own weights, folder and end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train.torch
import torch
from torch import Tensor, nn

from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.errors import KrdError, NonFiniteLossError, RunError
from krd_ray.maths.rectify import Rectifier
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.checkpoint import Position, restore_checkpoint, save_checkpoint
from krd_ray.train.descent import Descent
from krd_ray.train.evaluate import count_split, run_split
from krd_ray.train.objective import StepTargets, class_weights_at, objective_terms, rectifier_for
from krd_ray.train.reduce import all_finite, any_rank, share_buffers, sum_over_ranks
from krd_ray.train.rundir import MetricsLog, StudentDir
from krd_ray.train.student import Student, build_student, layout_of
from krd_ray.train.worker_spec import WorkerSpec


class OtherRankFailed(Exception):
    """Ends a student on a rank whose own values are good; the rank at fault writes what happened."""


class Stopped(Exception):
    """Ends a student on all ranks because it is asked to stop; nothing went wrong."""


@dataclass(frozen=True)
class Rank:
    """Which of a student's workers this is, of how many, and what it computes on."""

    number: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class StepInput:
    """What a step is made of; the same for all students of a process but for the targets.

    Args:
        batch: as it was read.
        view: float32 [B, 3, side, side], on the device.
        labels: int64 [B], on the device.
        targets: in the form that this student asks for; None: it has no teacher.
    """

    batch: Batch
    view: Tensor
    labels: Tensor
    targets: StepTargets | None


class Learner:
    """One student in a worker.

    Args:
        spec: what it is.
        folder: where its rows, checkpoints and weights go.
        rank: of the worker.
        keep: brings the folder to the run's place.
    """

    def __init__(self, spec: WorkerSpec, folder: StudentDir, rank: Rank, *, keep: Callable[[], None]) -> None:
        self.spec, self.folder, self.rank, self._keep = spec, folder, rank, keep
        self.rectifier: Rectifier | None = rectifier_for(spec.loss) if spec.teacher else None
        self._seed = int(np.random.SeedSequence((spec.seed, rank.number)).generate_state(1)[0])
        self.student = self._build()
        self.module: nn.Module = ray.train.torch.prepare_model(self.student)
        self.descent = Descent(self.student, spec.train, rank.device)
        self._class_counts = torch.tensor(spec.class_counts, device=rank.device)
        self._log = MetricsLog(folder, spec.student, folder.next_attempt()) if rank.number == 0 else None
        self._state = {
            "student": self.student,
            "optimizer": self.descent.optimizer,
            "scaler": self.descent.scaler,
        }
        last = self._restore()
        self.epoch, self.step_number, self._val_balanced = last.epoch + 1, last.step, last.val_balanced
        self.error: Exception | None = None
        self.is_open = True

    def step(self, given: StepInput, epoch: int, epochs_done: float) -> dict[str, float]:
        """Takes one step and returns the terms of the loss.

        Args:
            given: batch, view, targets.
            epoch: of the step.
            epochs_done: the same as a fraction, for the schedule.
        Raises:
            NonFiniteLossError: before weights are touched.
        """
        spec = self.spec
        self.descent.set_lr(epochs_done)
        self._seed_draws()
        with self.descent.autocast():
            logits, projected = self.module(given.view)
        terms = objective_terms(
            spec.loss,
            student_logits=logits,
            projected=projected,
            labels=given.labels,
            class_counts=self._class_counts,
            class_weights=class_weights_at(spec.loss.classification, self._class_counts, epoch),
            targets=given.targets,
        )
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        self._refuse_non_finite(values, given.batch, epoch)
        self.descent.step(terms["loss"])
        self.step_number += 1
        return values

    def end_epoch(self, epoch: int, counted: dict[str, Any]) -> None:
        """Validates and writes a checkpoint where they are due.

        Args:
            epoch: that has been trained.
            counted: which samples all ranks have seen in it.
        Raises:
            Stopped: the student is asked to stop, and this was not its last epoch.
            NonFiniteLossError: its weights are not finite.
        """
        spec = self.spec
        if spec.val_shards is not None and self._is_due(epoch, spec.train.val_every_epochs):
            self._validate(epoch, spec.val_shards)
        self.write("coverage", epoch, **counted)  # the epoch's last row: readers wait for it
        self.epoch = epoch + 1
        if self.epoch < spec.train.epochs:
            self.stop_if_asked()
        if self._is_due(epoch, spec.train.checkpoint_every_epochs):
            self._refuse_non_finite_weights()
            if self.rank.number == 0:
                position = Position(epoch, self.step_number, self._val_balanced)
                save_checkpoint(self.folder.checkpoints, position, self._state)
                self._keep()

    def end(self, error: Exception | None = None) -> None:
        """Ends this student for good, those beside it go on; an error of ours is written into its folder."""
        self.is_open, self.error = False, error
        if isinstance(error, KrdError):
            self.folder.write_error(error)
        self._keep()

    def export(self) -> None:
        """Writes the trained weights."""
        self._refuse_non_finite_weights()
        if self.rank.number > 0:
            return
        spec = self.spec
        card = ModelCard(
            model=spec.model,
            num_classes=len(spec.class_counts),
            image_size=spec.view.side,
            mean=spec.view.mean,
            std=spec.view.std,
            dataset=spec.dataset_hash,
            val_balanced=self._val_balanced,
        )
        save_weights(self.student.net.state_dict(), card, self.folder.weights)

    def stop_if_asked(self) -> None:
        """Raises Stopped on all ranks when the student is asked to stop."""
        if any_rank(self.rank.number == 0 and self.folder.stop.exists(), self.rank.device):
            raise Stopped

    def write(self, split: str, epoch: int, **values: Any) -> None:
        """Appends a metric row, on rank 0."""
        if self._log:
            self._log.write(split, epoch, self.step_number, **values)

    def _build(self) -> Student:
        spec = self.spec
        student = build_student(
            spec.model,
            num_classes=len(spec.class_counts),
            side=spec.view.side,
            seed=spec.seed,
            teacher_dim=spec.teacher.feature_dim if spec.teacher and spec.loss.needs_features else None,
        )
        return student.to(self.rank.device, memory_format=layout_of(spec.train))  # type: ignore[call-overload, no-any-return]

    def _seed_draws(self) -> None:
        """Dropout draws the same whoever else trains in this process, and after a restart.

        `torch.manual_seed` would go through all kinds of devices, which takes longer than all else around a step.
        """
        seed = self._seed + self.step_number
        torch.default_generator.manual_seed(seed)
        if self.rank.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _restore(self) -> Position:
        """The last checkpoint, which must be the same one on every rank."""
        rank = self.rank
        last = restore_checkpoint(self.folder.checkpoints, self._state, rank.device)
        epochs = sum_over_ranks(torch.tensor([last.epoch]), rank.device).item()
        if any_rank(epochs != rank.world * last.epoch, rank.device):
            raise RunError(
                f"student {self.spec.student}, rank {rank.number}: the last checkpoint in {self.folder.checkpoints} "
                f"is of epoch {last.epoch} here and of another on other ranks; run_dir must be storage that all "
                "nodes share"
            )
        return last

    def _refuse_non_finite(self, values: dict[str, float], batch: Batch, epoch: int) -> None:
        if all_finite(values.values(), self.rank.device):
            return
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if not bad:
            raise OtherRankFailed(f"rank {self.rank.number} stops: the loss is not finite on another rank")
        raise NonFiniteLossError(
            f"student {self.spec.student}, rank {self.rank.number}: the loss is not finite at epoch {epoch}, step "
            f"{self.step_number} (terms: {', '.join(bad)}; sample ids: {batch.sample_ids[:8].tolist()} ...). The "
            "last checkpoint is intact; lower train.lr, or set train.clip_norm or train.warmup_epochs"
        )

    def _refuse_non_finite_weights(self) -> None:
        """A finite loss can still have a gradient that is not; what came of it must not be kept."""
        finite = [float(torch.isfinite(tensor).all()) for tensor in self.student.state_dict().values()]
        if not all_finite([0.0 if all(finite) else float("inf")], self.rank.device):
            raise NonFiniteLossError(
                f"student {self.spec.student}, rank {self.rank.number}: weights are not finite after step "
                f"{self.step_number}. The last checkpoint is intact; lower train.lr, or set train.clip_norm or "
                "train.warmup_epochs"
            )

    def _is_due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch == self.spec.train.epochs - 1

    def _validate(self, epoch: int, shards: ShardSet) -> None:
        share_buffers(self.student.net)
        predictions = run_split(
            self.student.net,
            shards,
            self.spec.view,
            batch_size=2 * self.spec.train.batch_size,
            device=self.rank.device,
            rank=self.rank.number,
            world=self.rank.world,
        )
        counts = count_split(predictions, len(self.spec.class_counts))
        total = type(counts).from_tensor(sum_over_ranks(counts.to_tensor(), self.rank.device))
        metrics = total.metrics(self._class_counts.cpu())
        self._val_balanced = metrics["balanced"]
        self.write("val", epoch, **metrics)
