"""Answers how one worker trains its students: the same loop for a teacher, a baseline and students of a teacher.

Does not start anything (`students` and `run` do) and does not hold what belongs to one student (`learner` does). It
runs inside a Ray Train worker. Students that share a worker train in step: each batch is read, made into a view and
asked for once, whatever their number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ray.train
import ray.train.torch
import ray.util
import torch

from krd_ray.data.plan import IntArray
from krd_ray.data.shard_set import Batch
from krd_ray.errors import KrdError, NonFiniteLossError, StorageError
from krd_ray.maths.rectify import Rectifier
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import train_view
from krd_ray.storage.working_copy import working_copy
from krd_ray.train.epoch_account import EpochAccount, SharedClock
from krd_ray.train.epoch_rows import EpochRows, RowSettings
from krd_ray.train.learner import Learner, OtherRankFailed, Rank, StepInput, Stopped
from krd_ray.train.objective import StepTargets
from krd_ray.train.questions import Answers, Questions
from krd_ray.train.rundir import OF_RAY_TRAIN, StudentDir
from krd_ray.train.student import layout_of
from krd_ray.train.worker_spec import WorkerSpec

Own = tuple[
    WorkerSpec, StudentDir, Callable[[], None]
]  # a student, its folder here, what brings it to its place


def train_worker(config: dict[str, Any]) -> None:
    """Trains the students of one process from their last checkpoints; the function Ray Train calls on each rank.

    An error that a restart would only repeat (KrdError) is written to `error.json` of whom it concerns; an attempt
    that Ray Train starts all the same leaves those students out, and the driver reports the error. What goes wrong
    with one student alone ends no other. A student that is asked to stop (`StudentDir.stop`) exports no weights.

    Raises:
        KrdError: it concerns all students, or every single one has failed.
    """
    specs: Sequence[WorkerSpec] = config["specs"]
    with ExitStack() as stack:
        own: list[Own] = []
        for spec in specs:
            copy = stack.enter_context(working_copy(spec.place or spec.folder, skip=(f"{OF_RAY_TRAIN}/*",)))
            folder = StudentDir(copy.path)
            if not folder.error.exists() and not folder.stop.exists():  # it ended in an attempt before
                own.append((spec, folder, copy.push))
        errors = [learner.error for learner in _train(own)] if own else []
    if errors and all(errors):
        raise next(error for error in errors if error)


def _train(own: Sequence[Own]) -> list[Learner]:
    worker = _Worker([spec for spec, _, _ in own])
    try:
        worker.open(own)
        worker.run()
    except StorageError:  # a restart may reach the run's place again
        raise
    except KrdError as error:
        ended = {learner.spec.student for learner in worker.learners if not learner.is_open}
        for spec, folder, _ in own:
            if spec.student not in ended:
                folder.write_error(error)
        raise
    return worker.learners


def _own_placement_group() -> str | None:
    """The reservation that this worker lives in, so that somebody can give it back when nobody else does."""
    group = ray.util.get_current_placement_group()
    return group.id.hex() if group is not None else None


class _Worker:
    """One rank of a process's students, which agree in all that is read from `specs[0]` here."""

    def __init__(self, specs: Sequence[WorkerSpec]) -> None:
        context = ray.train.get_context()
        self.shared = specs[0]
        torch.set_num_threads(self.shared.num_threads)
        self.rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
        # Whoever students wait for goes first where cores are scarce; threads that torch starts later inherit it.
        on_cpu = self.rank.device.type == "cpu"
        self.niceness = os.nice(self.shared.train.niceness if on_cpu else 0)
        # The step's own thread does all its work when torch has no others; else the process's clock must do.
        self.cpu_clock = time.thread_time if self.shared.num_threads == 1 else time.process_time
        self.learners: list[Learner] = []

    def open(self, own: Sequence[Own]) -> None:
        """Builds the students, takes up their last checkpoints and begins to read."""
        for spec, folder, keep in own:
            self.learners.append(Learner(spec, folder, self.rank, keep=keep))
        self.rows = self._open_rows()
        self.epoch = min(learner.epoch for learner in self.learners)
        batches = self.rows.batches(self.epoch, self.shared.train.epochs)
        self.questions = Questions(self.shared, self.learners, batches, rank=self.rank.number)
        for learner in self.learners:
            learner.write(
                "start",
                learner.epoch,
                session=learner.spec.session,
                pid=os.getpid(),
                num_workers=self.rank.world,
                device=str(self.rank.device),
                node=ray.get_runtime_context().get_node_id(),
                placement_group=_own_placement_group(),
                niceness=self.niceness,
                process=[each.spec.student for each in self.learners],
            )

    def run(self) -> None:
        """Trains the epochs that are left while somebody is left to train, then exports the weights."""
        for epoch in range(self.epoch, self.shared.train.epochs):
            if not any(_open(self.learners)):
                break
            # After a kill between two checkpoints, one student may be an epoch ahead of another.
            due = [learner for learner in _open(self.learners) if learner.epoch <= epoch]
            counted = self._train_epoch(epoch, due)
            for learner in _open(due):
                with _apart(learner):
                    learner.end_epoch(epoch, counted)
        self.questions.close()
        for learner in _open(self.learners):
            with _apart(learner):
                learner.export()

    def _open_rows(self) -> EpochRows:
        spec = self.shared
        settings = RowSettings(
            sampler=spec.train.sampler,
            class_counts=spec.class_counts,
            seed=spec.shuffle_seed,
            batch_size=spec.train.batch_size,
            window_rows=spec.window_rows,
            cycle=spec.cycle,
            rank=self.rank.number,
            world=self.rank.world,
        )
        return EpochRows(spec.train_shards, settings)

    def _train_epoch(self, epoch: int, due: Sequence[Learner]) -> dict[str, Any]:
        """Trains one epoch and returns which samples all ranks together have seen."""
        plan = self.rows.plan(epoch)
        num_steps = self.rows.num_batches(plan)
        for learner in due:
            learner.module.train()
        accounts = self._open_accounts(due)
        seen: list[IntArray] = []
        for number, (batch, answers) in enumerate(self.questions.stream(num_steps)):
            started = self.cpu_clock()
            given = self._give(batch, answers)
            shared_s = (self.cpu_clock() - started) / max(len(due), 1)
            seen.append(batch.sample_ids)
            for learner in _open(due):
                with _apart(learner):
                    started = self.cpu_clock()
                    terms = learner.step(given[learner.rectifier], epoch, epoch + number / num_steps)
                    accounts[learner].add(len(batch), terms, self.cpu_clock() - started + shared_s)
                    self._show_progress(learner, accounts[learner], epoch)
            if not any(_open(self.learners)):
                return {}
        for learner in _open(due):
            learner.write("train", epoch, **accounts[learner].total(self.rank.device), lr=learner.descent.lr)
        return self.rows.coverage(plan, seen, self.rank.device)

    def _open_accounts(self, due: Sequence[Learner]) -> dict[Learner, EpochAccount]:
        """All have waited as long as their process; what it has asked and received is counted at the first one."""
        clock = SharedClock(len(due))
        accounts = {}
        for learner in due:
            waits = self.questions.stats if learner is due[0] else self.questions.waits
            accounts[learner] = EpochAccount(waits, self.rank.world, clock)
        return accounts

    def _give(self, batch: Batch, answers: Answers) -> dict[Rectifier | None, StepInput]:
        """The batch's view, once, with the targets in each form that somebody asked for."""
        device = self.rank.device
        drawn = (batch.images_BHWC, batch.sample_ids, batch.view_index, batch.labels)
        images, ids, index, labels = (on_device(each, device) for each in drawn)
        view = train_view(images, ids, index, self.shared.view)
        view = view.contiguous(memory_format=layout_of(self.shared.train))
        given: dict[Rectifier | None, StepInput] = {None: StepInput(batch, view, labels, None)}
        for rectifier, targets in answers.items():
            parts = [
                None if part is None else on_device(part, device)
                for part in (targets.logits, targets.features)
            ]
            given[rectifier] = StepInput(batch, view, labels, StepTargets(*parts))
        return given

    def _show_progress(self, learner: Learner, account: EpochAccount, epoch: int) -> None:
        if self.rank.number == 0 and account.is_due(self.shared.train.progress_every_s):
            learner.write("progress", epoch, **account.so_far(), lr=learner.descent.lr)
            if self.rank.world == 1:  # several ranks agree at the end of the epoch
                learner.stop_if_asked()


def _open(learners: Iterable[Learner]) -> Iterator[Learner]:
    """Those that have not ended, each looked at when it is its turn."""
    return (learner for learner in learners if learner.is_open)


@contextmanager
def _apart(learner: Learner) -> Iterator[None]:
    """What goes wrong with one student, the same on all its ranks, ends that student and no other."""
    try:
        yield
    except Stopped:
        learner.end()
    except (NonFiniteLossError, OtherRankFailed) as error:
        learner.end(error)
