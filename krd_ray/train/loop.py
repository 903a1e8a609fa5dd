"""Answers how one worker of one student trains: the same loop for a teacher, a baseline and a student.

Does not start anything (`students` and `run` do) and holds no formulas. It runs inside a Ray Train worker.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from krd_ray.config import LossConfig, TrainConfig
from krd_ray.data.plan import EpochPlan
from krd_ray.data.stream import Batch, ShardSet, plan_epoch, sample_ids_of, train_batches
from krd_ray.errors import KrdError, NonFiniteLossError
from krd_ray.maths.views import ViewSpec, train_view
from krd_ray.teacher.client import ClientStats, TeacherClient
from krd_ray.teacher.messages import SoftTargets
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.train.evaluate import count_split, run_split
from krd_ray.train.objective import StepTargets, objective_terms, rectifier_for
from krd_ray.train.reduce import all_finite, coverage, share_buffers, sum_over_ranks
from krd_ray.train.rundir import MetricsLog, StudentDir, write_json
from krd_ray.train.student import Student, build_optimizer, build_student, lr_factor


@dataclass(frozen=True)
class TeacherLink:
    """How a worker reaches the teacher."""

    replicas: tuple[Any, ...]
    teacher_hash: str
    feature_dim: int
    timeout_s: float


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
        seed: of weights; shuffle_seed: of the order, shared by the students of a run.
        window_rows: of the shuffle.
        folder: the student's folder in the run directory.
        session: how often a driver had started this student before.
        dataset_hash: for the card of the exported weights.
        num_threads: CPU threads of torch.
        teacher: None for a teacher or a baseline.
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


def train_worker(config: dict[str, Any]) -> None:
    """Trains one student from its last checkpoint to its last epoch; the function Ray Train calls on each rank.

    An error that a restart would only repeat (KrdError) is written to `error.json`; the attempt that Ray Train
    then starts returns at once, and the driver reports the error.
    """
    spec: WorkerSpec = config["spec"]
    folder = StudentDir(Path(spec.folder))
    if folder.error.exists():
        return
    try:
        _Worker(spec, folder).run()
    except KrdError as error:
        write_json(folder.error, {"kind": type(error).__name__, "message": error.message})
        raise


class _OtherRankFailed(Exception):
    """Ends a rank whose own values are good; the rank at fault writes what happened."""


def _derived_seed(*parts: int) -> int:
    """One seed from several numbers, for whatever in a model draws at random (dropout)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class _Worker:
    def __init__(self, spec: WorkerSpec, folder: StudentDir) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(spec.num_threads)
        self.spec, self.folder = spec, folder
        self.device = ray.train.torch.get_device()
        self.student = self._build()
        self.module: nn.Module = ray.train.torch.prepare_model(self.student)
        self.optimizer = build_optimizer(self.student, spec.train)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=spec.train.precision == "fp16")
        self.factor = lr_factor(spec.train)
        self.class_counts = torch.tensor(spec.class_counts, device=self.device)
        self.sample_ids = sample_ids_of(spec.train_shards)
        self.sorted_ids = np.sort(self.sample_ids)
        self.client = self._connect()
        self.log = MetricsLog(folder, spec.student, folder.next_attempt()) if self.rank == 0 else None
        self.val_balanced: float | None = None
        self.epoch, self.step = self._restore()
        self._write(
            "start",
            self.epoch,
            session=spec.session,
            pid=os.getpid(),
            num_workers=self.world,
            device=str(self.device),
        )
        self.step_cpu_s = 0.0
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
            if self._is_due(epoch, self.spec.train.checkpoint_every_epochs):
                self._checkpoint(epoch)
        self._refuse_non_finite_weights()
        if self.rank == 0:
            self._export()

    def _build(self) -> Student:
        spec = self.spec
        student = build_student(
            spec.model,
            num_classes=len(spec.class_counts),
            side=spec.view.side,
            seed=spec.seed,
            teacher_dim=spec.teacher.feature_dim if spec.teacher and spec.loss.rrd.weight > 0 else None,
        )
        layout = torch.channels_last if spec.train.channels_last else torch.contiguous_format
        return student.to(self.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def _connect(self) -> TeacherClient | None:
        spec, rectifier = self.spec, rectifier_for(self.spec.loss)
        if spec.teacher is None or rectifier is None:
            return None
        return TeacherClient(
            spec.teacher.replicas,
            spec.teacher.teacher_hash,
            spec.student,
            rectifier,
            in_flight=spec.train.in_flight,
            timeout_s=spec.teacher.timeout_s,
        )

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """Trains one epoch and returns which samples all ranks together have seen."""
        spec, started, cpu = self.spec, time.perf_counter(), time.process_time()
        plan = plan_epoch(
            spec.train_shards, seed=spec.shuffle_seed, epoch=epoch, rank=self.rank, world=self.world
        )
        waits = self.client.stats if self.client else ClientStats()
        before = asdict(waits)
        num_steps = -(-plan.num_rows // spec.train.batch_size)
        sums: dict[str, float] = {}
        seen: list[Any] = []
        shown = started
        self.step_cpu_s = 0.0
        self.module.train()
        for number, (batch, targets) in enumerate(self._batches(plan, epoch, waits)):
            self._set_lr(epoch + number / num_steps)
            step_cpu = self.cpu_clock()
            for name, value in self._train_step(batch, targets, epoch).items():
                sums[name] = sums.get(name, 0.0) + value * len(batch)
            self.step_cpu_s += self.cpu_clock() - step_cpu
            seen.append(batch.sample_ids)
            if self.log and time.perf_counter() - shown > spec.train.progress_every_s:
                shown = time.perf_counter()
                self._log_epoch("progress", epoch, sums, seen, shown - started, before, waits, cpu)
        self._log_epoch("train", epoch, sums, seen, time.perf_counter() - started, before, waits, cpu)
        left_out = self.sample_ids[list(plan.left_out)]
        return coverage(self.sorted_ids, seen, left_out.tolist(), self.device)

    def _batches(
        self, plan: EpochPlan, epoch: int, waits: ClientStats
    ) -> Iterator[tuple[Batch, SoftTargets | None]]:
        spec = self.spec
        batches = train_batches(
            spec.train_shards,
            plan,
            batch_size=spec.train.batch_size,
            seed=spec.shuffle_seed,
            epoch=epoch,
            rank=self.rank,
            window_rows=spec.window_rows,
        )
        view_index = self._view_index(epoch)
        if self.client is not None:
            yield from self.client.stream(batches, view_index)
            return
        started = time.perf_counter()
        for batch in batches:
            waits.wait_data_s += time.perf_counter() - started
            yield batch, None
            started = time.perf_counter()

    def _view_index(self, epoch: int) -> int:
        return epoch if self.spec.cycle is None else epoch % self.spec.cycle

    def _train_step(self, batch: Batch, targets: SoftTargets | None, epoch: int) -> dict[str, float]:
        """One step; returns the terms as floats. Raises NonFiniteLossError before weights are touched."""
        spec, labels = self.spec, torch.from_numpy(batch.labels).to(self.device)
        images = torch.from_numpy(batch.images_BHWC).to(self.device, non_blocking=True)
        ids = torch.from_numpy(batch.sample_ids).to(self.device)
        view = train_view(images, ids, self._view_index(epoch), spec.view)
        if spec.train.channels_last:
            view = view.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            logits, projected = self.module(view)
        terms = objective_terms(
            spec.loss,
            student_logits=logits,
            projected=projected,
            labels=labels,
            class_counts=self.class_counts,
            targets=self._to_device(targets),
        )
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        self._refuse_non_finite(values, batch, epoch)
        self._update(terms["loss"])
        return values

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.spec.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), self.spec.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1

    def _autocast(self) -> Any:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self.spec.train.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def _to_device(self, targets: SoftTargets | None) -> StepTargets | None:
        if targets is None:
            return None
        parts = [
            None if part is None else torch.from_numpy(np.array(part)).to(self.device, non_blocking=True)
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

    def _set_lr(self, epochs_done: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.train.lr * self.factor(epochs_done)

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

    def _log_epoch(
        self,
        split: str,
        epoch: int,
        sums: dict[str, float],
        seen: list[Any],
        wall_s: float,
        before: dict[str, Any],
        waits: ClientStats,
        cpu: float,
    ) -> None:
        """Writes sums over ranks (`train`), or this rank's own so far (`progress`)."""
        values = {name: value - before[name] for name, value in asdict(waits).items()}
        values |= {f"sum_{name}": value for name, value in sums.items()}
        values |= {"num_samples": sum(map(len, seen)), "wall_s": wall_s}
        values |= {"cpu_s": time.process_time() - cpu, "step_cpu_s": self.step_cpu_s}
        if split == "train" and self.world > 1:
            vector = torch.tensor(list(values.values()), dtype=torch.float64)
            values = dict(zip(values, sum_over_ranks(vector, self.device).tolist(), strict=True))
        means = {name: values.pop(f"sum_{name}") / values["num_samples"] for name in sums}
        values["compute_s"] = values.pop("wall_s") - values["wait_targets_s"] - values["wait_data_s"]
        values["images_per_s"] = values["num_samples"] / wall_s
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        self._write(split, epoch, **means, **values)

    def _write(self, split: str, epoch: int, **values: Any) -> None:
        if self.log:
            self.log.write(split, epoch, self.step, **values)

    def _checkpoint(self, epoch: int) -> None:
        """Reports the epoch on every rank; rank 0 attaches model, optimiser, scaler and epoch."""
        self._refuse_non_finite_weights()
        if self.rank != 0:
            ray.train.report({"epoch": epoch})
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "epoch": epoch,
                "step": self.step,
                "val_balanced": self.val_balanced,
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            torch.save(state, Path(folder) / "state.pt")
            ray.train.report({"epoch": epoch}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _restore(self) -> tuple[int, int]:
        """Loads the last checkpoint, if there is one, and returns the epoch and step to start with."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0, 0
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location=self.device, weights_only=True)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.val_balanced = state["val_balanced"]
        return int(state["epoch"]) + 1, int(state["step"])

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
