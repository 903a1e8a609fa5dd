"""Answers how one worker of one student trains: the same loop for a teacher, a baseline and a student.

Does not start anything (`students` and `run` do) and holds no formulas. It runs inside a Ray Train worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import ray.util
import torch
from torch import nn

from krd_ray.config import TrainConfig
from krd_ray.config_loss import LossConfig
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.errors import KrdError, NonFiniteLossError, RunError, StorageError
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.storage.working_copy import working_copy
from krd_ray.teacher.client import ClientStats, TeacherClient
from krd_ray.teacher.messages import SoftTargets
from krd_ray.teacher.ports import TeacherLink
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.checkpoint import Position, restore_checkpoint, save_checkpoint
from krd_ray.train.descent import Descent
from krd_ray.train.epoch_account import EpochAccount
from krd_ray.train.epoch_rows import EpochRows, RowSettings
from krd_ray.train.evaluate import count_split, run_split
from krd_ray.train.objective import StepTargets, class_weights_at, objective_terms, rectifier_for
from krd_ray.train.reduce import all_finite, any_rank, share_buffers, sum_over_ranks
from krd_ray.train.rundir import OF_RAY_TRAIN, MetricsLog, StudentDir, write_json
from krd_ray.train.student import Student, build_student, layout_of


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker of one student needs; the same on every rank.

    Args:
        student, model: names.
        train, loss: with the student's own settings laid over the run's; nothing left on `auto`.
        view: of training and evaluation.
        cycle: number of different views per image; None: a new one each epoch.
        train_shards, val_shards: splits, with cached blocks where there are any.
        class_counts: n_c of the training split.
        seed: of weights; shuffle_seed: of the order of samples.
        window_rows: of the shuffle.
        folder: the student's folder in the run directory, as the driver sees it.
        session: how often a driver had started this student before.
        dataset_hash: for the card of the exported weights.
        num_threads: CPU threads of torch.
        teacher: None for a teacher or a baseline.
        place: path or URI by which every node knows the student's folder; None: by the same path.
    """

    student: str
    model: str
    train: TrainConfig
    loss: LossConfig
    view: ViewSpec
    cycle: int | None
    train_shards: ShardSet
    val_shards: ShardSet | None
    class_counts: tuple[int, ...]
    seed: int
    shuffle_seed: int
    window_rows: int
    folder: str
    session: int
    dataset_hash: str
    num_threads: int
    teacher: TeacherLink | None
    place: str | None = None


def train_worker(config: dict[str, Any]) -> None:
    """Trains one student from its last checkpoint to its last epoch; the function Ray Train calls on each rank.

    An error that a restart would only repeat (KrdError) is written to `error.json`; an attempt that Ray Train
    starts all the same returns at once, and the driver reports the error. A student that is asked to stop
    (`StudentDir.stop`) returns without exporting weights.
    """
    spec: WorkerSpec = config["spec"]
    with working_copy(spec.place or spec.folder, skip=(f"{OF_RAY_TRAIN}/*",)) as copy:
        folder = StudentDir(copy.path)
        if folder.error.exists():
            return
        try:
            _Worker(spec, folder, keep=copy.push).run()
        except _Stopped:
            return
        except StorageError:  # a restart may reach the run's place again
            raise
        except KrdError as error:
            write_json(folder.error, {"kind": type(error).__name__, "message": error.message})
            raise


class _OtherRankFailed(Exception):
    """Ends a rank whose own values are good; the rank at fault writes what happened."""


class _Stopped(Exception):
    """Ends all ranks of a student that is asked to stop; nothing went wrong."""


def _own_placement_group() -> str | None:
    """The reservation that this worker lives in, so that somebody can give it back when nobody else does."""
    group = ray.util.get_current_placement_group()
    return group.id.hex() if group is not None else None


def _derived_seed(*parts: int) -> int:
    """One seed from several numbers, for whatever in a model draws at random (dropout)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class _Worker:
    def __init__(self, spec: WorkerSpec, folder: StudentDir, *, keep: Callable[[], None]) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(spec.num_threads)
        self.spec, self.folder, self.keep = spec, folder, keep
        self.device = ray.train.torch.get_device()
        # Whoever a student waits for goes first where cores are scarce; threads that torch starts later inherit it.
        niceness = os.nice(spec.train.niceness if self.device.type == "cpu" else 0)
        self.student = self._build()
        self.module: nn.Module = ray.train.torch.prepare_model(self.student)
        self.descent = Descent(self.student, spec.train, self.device)
        self.class_counts = torch.tensor(spec.class_counts, device=self.device)
        self.rows = self._open_rows()
        self.client = self._connect()
        self.log = MetricsLog(folder, spec.student, folder.next_attempt()) if self.rank == 0 else None
        self.state = {
            "student": self.student,
            "optimizer": self.descent.optimizer,
            "scaler": self.descent.scaler,
        }
        last = self._restore()
        self.epoch, self.step, self.val_balanced = last.epoch + 1, last.step, last.val_balanced
        self.batches = self.rows.batches(self.epoch, spec.train.epochs)
        self._write(
            "start",
            self.epoch,
            session=spec.session,
            pid=os.getpid(),
            num_workers=self.world,
            device=str(self.device),
            node=ray.get_runtime_context().get_node_id(),
            placement_group=_own_placement_group(),
            niceness=niceness,
        )
        # The step's own thread does all its work when torch has no others; else the process's clock must do.
        self.cpu_clock = time.thread_time if spec.num_threads == 1 else time.process_time

    def run(self) -> None:
        """Trains the epochs that are left, then exports the weights."""
        for epoch in range(self.epoch, self.spec.train.epochs):
            torch.manual_seed(_derived_seed(self.spec.seed, self.rank, epoch))
            counted = self._train_epoch(epoch)
            if self.spec.val_shards is not None and self._is_due(epoch, self.spec.train.val_every_epochs):
                self._validate(epoch, self.spec.val_shards)
            self._write("coverage", epoch, **counted)  # the epoch's last row: readers wait for it
            if epoch < self.spec.train.epochs - 1:
                self._stop_if_asked()
            if self._is_due(epoch, self.spec.train.checkpoint_every_epochs):
                self._refuse_non_finite_weights()
                if self.rank == 0:
                    position = Position(epoch, self.step, self.val_balanced)
                    save_checkpoint(self.folder.checkpoints, position, self.state)
                    self.keep()
        self._refuse_non_finite_weights()
        if self.client is not None:
            self.client.close()
        if self.rank == 0:
            self._export()

    def _build(self) -> Student:
        spec = self.spec
        student = build_student(
            spec.model,
            num_classes=len(spec.class_counts),
            side=spec.view.side,
            seed=spec.seed,
            teacher_dim=spec.teacher.feature_dim if spec.teacher and spec.loss.needs_features else None,
        )
        return student.to(self.device, memory_format=layout_of(spec.train))  # type: ignore[call-overload, no-any-return]

    def _connect(self) -> TeacherClient | None:
        spec, rectifier = self.spec, rectifier_for(self.spec.loss)
        if spec.teacher is None or rectifier is None:
            return None
        return TeacherClient(
            spec.teacher.open(spec.student, self.rank),
            spec.teacher.teacher_hash,
            spec.student,
            rectifier,
            # Only an actor works while this process does: elsewhere there is no latency to hide.
            in_flight=spec.train.in_flight or (None if spec.teacher.placement == "actors" else 1),
            timeout_s=spec.teacher.timeout_s,
        )

    def _restore(self) -> Position:
        """The last checkpoint, which must be the same one on every rank."""
        last = restore_checkpoint(self.folder.checkpoints, self.state, self.device)
        epochs = sum_over_ranks(torch.tensor([last.epoch]), self.device).item()
        if any_rank(epochs != self.world * last.epoch, self.device):
            raise RunError(
                f"student {self.spec.student}, rank {self.rank}: the last checkpoint in {self.folder.checkpoints} "
                f"is of epoch {last.epoch} here and of another on other ranks; run_dir must be storage that all "
                "nodes share"
            )
        return last

    def _open_rows(self) -> EpochRows:
        spec = self.spec
        settings = RowSettings(
            sampler=spec.train.sampler,
            class_counts=spec.class_counts,
            seed=spec.shuffle_seed,
            batch_size=spec.train.batch_size,
            window_rows=spec.window_rows,
            cycle=spec.cycle,
            rank=self.rank,
            world=self.world,
        )
        return EpochRows(spec.train_shards, settings)

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Trains one epoch and returns which samples all ranks together have seen."""
        train = self.spec.train
        waits = self.client.stats if self.client else ClientStats()
        account = EpochAccount(waits, self.world)
        plan = self.rows.plan(epoch)
        num_steps = self.rows.num_batches(plan)
        self.module.train()
        for number, (batch, targets) in enumerate(self._next_batches(num_steps, waits)):
            self.descent.set_lr(epoch + number / num_steps)
            step_cpu = self.cpu_clock()
            terms = self._train_step(batch, targets, epoch)
            account.add(batch, terms, self.cpu_clock() - step_cpu)
            if self.log and account.is_due(train.progress_every_s):
                self._write("progress", epoch, **account.so_far(), lr=self.descent.lr)
                if self.world == 1:  # several ranks agree at the end of the epoch
                    self._stop_if_asked()
        self._write("train", epoch, **account.total(self.device), lr=self.descent.lr)
        return self.rows.coverage(plan, account.seen, self.device)

    def _next_batches(self, number: int, waits: ClientStats) -> Iterator[tuple[Batch, SoftTargets | None]]:
        if self.client is not None:
            yield from self.client.stream(self.batches, number)
            return
        for _ in range(number):
            started = time.perf_counter()
            batch = next(self.batches)
            waits.wait_data_s += time.perf_counter() - started
            yield batch, None

    def _train_step(self, batch: Batch, targets: SoftTargets | None, epoch: int) -> dict[str, float]:
        """One step; returns the terms as floats. Raises NonFiniteLossError before weights are touched."""
        spec, labels = self.spec, on_device(batch.labels, self.device)
        drawn = (batch.images_BHWC, batch.sample_ids, batch.view_index)
        images, ids, index = (on_device(each, self.device) for each in drawn)
        view = train_view(images, ids, index, spec.view).contiguous(memory_format=layout_of(spec.train))
        with self.descent.autocast():
            logits, projected = self.module(view)
        terms = objective_terms(
            spec.loss,
            student_logits=logits,
            projected=projected,
            labels=labels,
            class_counts=self.class_counts,
            class_weights=class_weights_at(spec.loss.classification, self.class_counts, epoch),
            targets=self._to_device(targets),
        )
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        self._refuse_non_finite(values, batch, epoch)
        self.descent.step(terms["loss"])
        self.step += 1
        return values

    def _to_device(self, targets: SoftTargets | None) -> StepTargets | None:
        if targets is None:
            return None
        parts = [
            None if part is None else on_device(part, self.device)
            for part in (targets.logits, targets.features)
        ]
        return StepTargets(*parts)

    def _refuse_non_finite(self, values: dict[str, float], batch: Batch, epoch: int) -> None:
        if all_finite(values.values(), self.device):
            return
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if not bad:
            raise _OtherRankFailed(f"rank {self.rank} stops: the loss is not finite on another rank")
        raise NonFiniteLossError(
            f"student {self.spec.student}, rank {self.rank}: the loss is not finite at epoch {epoch}, step "
            f"{self.step} (terms: {', '.join(bad)}; sample ids: {batch.sample_ids[:8].tolist()} ...). The last "
            "checkpoint is intact; lower train.lr, or set train.clip_norm or train.warmup_epochs"
        )

    def _refuse_non_finite_weights(self) -> None:
        """A finite loss can still have a gradient that is not; what came of it must not be kept."""
        finite = [float(torch.isfinite(tensor).all()) for tensor in self.student.state_dict().values()]
        if not all_finite([0.0 if all(finite) else float("inf")], self.device):
            raise NonFiniteLossError(
                f"student {self.spec.student}, rank {self.rank}: weights are not finite after step {self.step}. The "
                "last checkpoint is intact; lower train.lr, or set train.clip_norm or train.warmup_epochs"
            )

    def _stop_if_asked(self) -> None:
        if any_rank(self.rank == 0 and self.folder.stop.exists(), self.device):
            raise _Stopped

    def _is_due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch == self.spec.train.epochs - 1

    def _validate(self, epoch: int, shards: ShardSet) -> None:
        share_buffers(self.student.net)
        predictions = run_split(
            self.student.net,
            shards,
            self.spec.view,
            batch_size=2 * self.spec.train.batch_size,
            device=self.device,
            rank=self.rank,
            world=self.world,
        )
        counts = count_split(predictions, len(self.spec.class_counts))
        total = type(counts).from_tensor(sum_over_ranks(counts.to_tensor(), self.device))
        metrics = total.metrics(self.class_counts.cpu())
        self.val_balanced = metrics["balanced"]
        self._write("val", epoch, **metrics)

    def _write(self, split: str, epoch: int, **values: Any) -> None:
        if self.log:
            self.log.write(split, epoch, self.step, **values)

    def _export(self) -> None:
        spec = self.spec
        card = ModelCard(
            model=spec.model,
            num_classes=len(spec.class_counts),
            image_size=spec.view.side,
            mean=spec.view.mean,
            std=spec.view.std,
            dataset=spec.dataset_hash,
            val_balanced=self.val_balanced,
        )
        save_weights(self.student.net.state_dict(), card, self.folder.weights)
