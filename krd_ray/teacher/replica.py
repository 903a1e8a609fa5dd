"""Answers how one replica of the teacher works: start, calibrate, serve, fill its store, account.

Does not decide where replicas run (`group` puts them into Ray actors, `ports` into a student's own process) or
whether the teacher is good enough (`group` does).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from krd_ray.data.pixels import CachedPixels
from krd_ray.data.shard_set import ShardSet, sample_ids_of
from krd_ray.data.stream import eval_batches
from krd_ray.maths.calibration import Calibration
from krd_ray.storage.working_copy import working_copy
from krd_ray.teacher.answers import Answers
from krd_ray.teacher.calibrate import (
    ClassSums,
    calibration_from,
    load_calibration,
    save_calibration,
    sum_classes,
)
from krd_ray.teacher.engine import EngineStats, Images, TargetEngine
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.messages import Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.spec import TeacherSpec, load_teacher, store_folder, store_key
from krd_ray.teacher.stats import StatsLog
from krd_ray.teacher.store import IntArray, TargetStore, lock_folder
from krd_ray.teacher.store_archive import fetch_store, publish_store

FETCH_TIMEOUT_S = 15.0  # a student's node that stalls gives up its claims then; others bring their own pixels


@dataclass(frozen=True)
class TeacherInfo:
    """What a replica says of itself once it is up."""

    teacher_hash: str
    model: str
    num_classes: int
    feature_dim: int
    incarnation: int
    pid: int
    device: str
    node: str
    accuracy: float | None


class Replica:
    """One replica: network, engine and store. `TeacherGroup` starts it as a Ray actor."""

    def __init__(self, spec: TeacherSpec) -> None:
        if spec.owns_process:
            torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._teacher = load_teacher(spec)
        self._forward = TeacherForward(
            self._teacher.net,
            self._teacher.card,
            spec.view,
            device=torch.device(spec.device),
            bf16=spec.precision == "bf16",
            micro_batch=spec.micro_batch,
            compile=spec.compile,
        )
        self._records = ExitStack()
        folder = self._records.enter_context(working_copy(spec.run_dir)).path
        self._log = StatsLog(folder, spec.name, is_actor=spec.owns_process)
        self._answers = Answers(
            self._teacher.teacher_hash,
            spec.class_counts,
            incarnation=self._log.incarnation,
            priors=spec.priors,
        )
        self._accuracy: float | None = None
        found = load_calibration(spec.calibration, self._teacher.teacher_hash)
        if found is not None:
            self._take(*found)
        ids = sample_ids_of(spec.shards)
        cached = spec.shards.blocks is not None
        self._pixels = CachedPixels(spec.shards, ids, timeout_s=FETCH_TIMEOUT_S) if cached else None
        self._published = 0  # forwards of which the store's place knows
        self._engine = self._start_engine(ids)
        self._log.write("start", EngineStats())

    def info(self) -> TeacherInfo:
        """Returns who this replica is; the first call waits for its start."""
        return TeacherInfo(
            teacher_hash=self._teacher.teacher_hash,
            model=self._teacher.model,
            num_classes=len(self._spec.class_counts),
            feature_dim=self._teacher.feature_dim,
            incarnation=self._log.incarnation,
            pid=os.getpid(),
            device=self._spec.device,
            node=ray.get_runtime_context().get_node_id(),
            accuracy=self._accuracy,
        )

    def sum_part(self, shards: ShardSet) -> ClassSums:
        """Returns this replica's part of the calibration sums; `shards` may carry cached blocks."""
        batches = eval_batches(
            shards,
            batch_size=4 * self._spec.micro_batch,
            rank=self._spec.replica,
            world=self._spec.num_replicas,
        )
        num_classes = len(self._spec.class_counts)
        sums = sum_classes(self._forward, batches, num_classes, self._teacher.feature_dim)
        self._log.calibration_forwards += int(sums.samples.sum())
        return sums

    def calibrate(self, *parts: ClassSums) -> float:
        """Adds the parts of all replicas, keeps the calibration and returns the macro training accuracy."""
        calibration, accuracy = calibration_from(parts, self._spec.class_counts)
        self._take(calibration, accuracy)
        if self._spec.replica == 0:
            save_calibration(calibration, self._teacher.teacher_hash, accuracy, self._spec.calibration)
        return accuracy

    def probe(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Returns logits of images without augmentation, float32 [n, C]; replicas must agree on them."""
        return self._forward.on_eval_view(images)[0].numpy()

    def targets(self, request: TargetRequest) -> SoftTargets:
        """Returns rectified soft targets for one batch; asking twice gives the same bytes.

        Raises:
            TeacherError: another teacher is meant, ids and views are not as many, features came before calibration,
                or a rectified value does not fit into float16.
            ConfigError: the rectifier's kind of prior does not fit the teacher's features.
        """
        self._answers.check(request)
        fetch = functools.partial(self._fetch, request)
        rows = self._engine.serve(request.view_index, request.sample_ids, fetch)
        answer = self._answers.make(rows, request)
        self._engine.add_bytes(sent=answer.num_bytes)
        if self._log.is_due:  # a warm store serves without forwards
            self._log.write("stats", self._engine.stats())
        return answer

    def fill(self, shards: ShardSet, views: Sequence[int]) -> int:
        """Computes this replica's share of some views into its store, and returns how many rows of them it holds now.

        Args:
            shards: the training split, with cached blocks where there are any; Ray Data reads it otherwise.
            views: view indices; what the store holds already is not computed again.
        """
        for view in views:
            for batch in eval_batches(shards, batch_size=4 * self._spec.micro_batch):
                mine = np.flatnonzero(
                    home_of(batch.sample_ids, self._spec.num_replicas) == self._spec.replica
                )
                if len(mine):
                    images, index = batch.images_BHWC[mine], np.full(len(mine), view)
                    self._engine.serve(index, batch.sample_ids[mine], images.__getitem__)
        self._log.write("stats", self._engine.stats())
        return self.rows_held(views)

    def rows_held(self, views: Sequence[int]) -> int:
        """Returns how many rows of some views the store holds now."""
        return sum(self._engine.rows_held(view) for view in views)

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this process, and writes them down."""
        stats = self._engine.stats()
        self._log.write("stats", stats)
        return asdict(stats)

    def publish(self) -> None:
        """Takes a persistent store whose place is a URI there, if anything has been computed since.

        Raises:
            StorageError: the URI cannot be written; the store stays on this node.
        """
        forwards = self._engine.stats().forwards
        if forwards > self._published:
            publish_store(self._spec, self._teacher.teacher_hash)
            self._published = forwards

    def close(self) -> dict[str, Any]:
        """Stops the engine, writes the last statistics and frees the store."""
        self._engine.close()
        stats = self.stats()
        self.publish()
        self._store.close()
        self._lock.close()
        self._records.close()
        return stats

    def _take(self, calibration: Calibration, accuracy: float) -> None:
        self._answers.calibrate(calibration)
        self._accuracy = accuracy

    def _fetch(self, request: TargetRequest, places: IntArray) -> Images:
        """Pixels of some of a request's rows: brought along, lent by reference, or looked up here."""
        if request.pixels is None and self._pixels is not None:
            return self._pixels(request.sample_ids[places])
        lent = request.pixels
        pixels: Pixels = (
            lent if isinstance(lent, Pixels) else ray.get(request.pixels, timeout=FETCH_TIMEOUT_S)
        )
        images = pixels.images_BHWC[request.rows[places]]
        self._engine.add_bytes(received=images.nbytes)
        return images

    def _start_engine(self, ids: IntArray) -> TargetEngine:
        spec, teacher_hash = self._spec, self._teacher.teacher_hash
        width = len(spec.class_counts) + self._teacher.feature_dim
        folder = store_folder(spec, teacher_hash, spec.replica)
        self._lock = lock_folder(folder)
        fetch_store(spec, teacher_hash, spec.replica)
        self._store = TargetStore(
            folder,
            store_key(spec, teacher_hash),
            ids[home_of(ids, spec.num_replicas) == spec.replica],
            width,
            memory_bytes=spec.memory_bytes,
            disk_bytes=spec.disk_bytes,
            persist=spec.persist,
        )
        return TargetEngine(
            self._forward,
            self._store,
            width=width,
            micro_batch=spec.micro_batch,
            queue_rows=spec.queue_rows,
            on_forward=functools.partial(self._log.write, "stats"),
            cpu_clock=time.thread_time if torch.get_num_threads() == 1 else time.process_time,
            counts_process=spec.owns_process,
        )
