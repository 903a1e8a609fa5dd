"""Answers how one replica of the teacher lives in a Ray actor: start, calibrate, serve, account.

Does not decide where replicas run or whether the teacher is good enough (`group` does).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.util import metrics as ray_metrics

from krd_ray.data.stream import ShardSet, eval_batches, sample_ids_of
from krd_ray.errors import TeacherError
from krd_ray.maths.calibration import Calibration
from krd_ray.maths.rectify import log_class_prior, rectify_features, rectify_logits, to_float16
from krd_ray.maths.views import ViewSpec
from krd_ray.models.outputs import feature_dim_of
from krd_ray.teacher.calibrate import (
    ClassSums,
    calibration_from,
    load_calibration,
    save_calibration,
    sum_classes,
)
from krd_ray.teacher.engine import EngineStats, TargetEngine
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.messages import Float16Array, Pixels, SoftTargets, TargetRequest
from krd_ray.teacher.store import RowArray, TargetStore, lock_folder
from krd_ray.teacher.weights import hash_state, load_model

STATS_INTERVAL_S = 1.0
LENGTH_REMEDY = "loss.rrd.form: norm_aware and loss.nd keep the teacher's length: take cosine, leave nd out."
PRIOR_REMEDY = "loss.lrd.tau_prior adds tau_prior * |log pi| to them: lower it."
FETCH_TIMEOUT_S = 15.0  # a student's node that stalls gives up its claims then; others bring their own pixels


@dataclass(frozen=True)
class TeacherSpec:
    """All that a replica needs to start, and to start again after a crash; picklable and small.

    Args:
        weights, model: as in the config; absolute path.
        view: what the students see.
        shards: the training split, without cached blocks.
        dataset_hash: content hash of the shards; answers kept from other images are not used.
        class_counts: n_c of the training split.
        replica, num_replicas: which share of the samples this process is the home of.
        micro_batch, queue_rows, memory_bytes, disk_bytes, persist, precision, num_threads: as in the config.
        device: `cpu` or `cuda`.
        store_dir: folder of the target store; local to the node for speed.
        run_dir: the run's `teacher` folder, for statistics and calibration.
    """

    weights: str
    model: str | None
    view: ViewSpec
    shards: ShardSet
    dataset_hash: str
    class_counts: tuple[int, ...]
    replica: int
    num_replicas: int
    micro_batch: int
    queue_rows: int
    memory_bytes: int
    disk_bytes: int
    persist: bool
    precision: str
    num_threads: int
    device: str
    store_dir: str
    run_dir: str


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
    accuracy: float | None


class TeacherActor:
    """One replica: engine and store behind Ray methods. Start it through `TeacherGroup`."""

    def __init__(self, spec: TeacherSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._folder = Path(spec.run_dir)
        net, card = load_model(
            Path(spec.weights),
            model=spec.model,
            num_classes=len(spec.class_counts),
            image_size=spec.view.side,
        )
        normalisation = f"{card.mean}{card.std}" if card else ""
        self._model_name = spec.model or (card.model if card else "")
        shape = f"{spec.shards.side} {spec.micro_batch}"
        self._hash = hash_state(
            net.state_dict(),
            self._model_name,
            spec.view.key(),
            shape,
            normalisation,
            spec.precision,
            spec.device,
        )
        self._feature_dim = feature_dim_of(net)
        self._forward = TeacherForward(
            net,
            card,
            spec.view,
            device=torch.device(spec.device),
            bf16=spec.precision == "bf16",
            micro_batch=spec.micro_batch,
        )
        self._log_prior = log_class_prior(torch.tensor(spec.class_counts))
        self._calibration: Calibration | None = None
        self._accuracy: float | None = None
        found = load_calibration(self._calibration_path, self._hash)
        if found is not None:
            self._calibration, self._accuracy = found
        self._stats_file = (self._folder / f"stats-{spec.replica}.jsonl").open("a", encoding="utf-8")
        self._stats_lock = threading.Lock()
        self._stats_written = time.monotonic()
        self._incarnation = self._count_starts()
        self._restarted = int(ray.get_runtime_context().was_current_actor_reconstructed)
        self._calibration_forwards = 0
        self._metrics = _Metrics(spec.replica)
        self._engine = self._start_engine()
        self._write_stats("start", EngineStats())

    def info(self) -> TeacherInfo:
        """Returns who this replica is; the first call waits for its start."""
        return TeacherInfo(
            teacher_hash=self._hash,
            model=self._model_name,
            num_classes=len(self._spec.class_counts),
            feature_dim=self._feature_dim,
            incarnation=self._incarnation,
            pid=os.getpid(),
            device=self._spec.device,
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
        sums = sum_classes(self._forward, batches, len(self._spec.class_counts), self._feature_dim)
        self._calibration_forwards += int(sums.samples.sum())
        return sums

    def calibrate(self, *parts: ClassSums) -> float:
        """Adds the parts of all replicas, keeps the calibration and returns the macro training accuracy."""
        self._calibration, self._accuracy = calibration_from(parts, self._spec.class_counts)
        if self._spec.replica == 0:
            save_calibration(self._calibration, self._hash, self._accuracy, self._calibration_path)
        return self._accuracy

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
        self._check(request)

        def fetch(places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
            pixels: Pixels = ray.get(request.pixels, timeout=FETCH_TIMEOUT_S)
            images = pixels.images_BHWC[request.rows[places]]
            self._engine.add_bytes(received=images.nbytes)
            return images

        rows = self._engine.serve(request.view_index, request.sample_ids, fetch)
        logits, features = self._rectify(rows, request)
        answer = SoftTargets(
            request.sample_ids, logits, features, request.rectifier, self._hash, self._incarnation
        )
        self._engine.add_bytes(sent=answer.num_bytes)
        if time.monotonic() - self._stats_written > STATS_INTERVAL_S:  # a warm store serves without forwards
            self._after_forward(self._engine.stats())
        return answer

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this process, and writes them down."""
        stats = self._engine.stats()
        self._write_stats("stats", stats)
        return asdict(stats)

    def close(self) -> dict[str, Any]:
        """Stops the engine, writes the last statistics and frees the store."""
        self._engine.close()
        stats = self.stats()
        self._store.close()
        self._lock.close()
        return stats

    @property
    def _calibration_path(self) -> Path:
        return self._folder / "calibration.safetensors"

    def _start_engine(self) -> TargetEngine:
        spec = self._spec
        ids = sample_ids_of(spec.shards)
        width = len(spec.class_counts) + self._feature_dim
        key = hashlib.sha256(f"{self._hash} {spec.dataset_hash} {spec.num_replicas}".encode()).hexdigest()
        folder = Path(spec.store_dir) / f"replica-{spec.replica}-{key[:16]}"
        self._lock = lock_folder(folder)
        self._store = TargetStore(
            folder,
            key,
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
            on_forward=self._after_forward,
            cpu_clock=time.thread_time if spec.num_threads == 1 else time.process_time,
        )

    def _check(self, request: TargetRequest) -> None:
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

    def _rectify(
        self, rows: RowArray, request: TargetRequest
    ) -> tuple[Float16Array | None, Float16Array | None]:
        num_classes, spec = len(self._spec.class_counts), request.rectifier
        labels = torch.from_numpy(np.array(request.labels))
        raw = torch.from_numpy(rows)
        logits = features = None
        if spec.send_logits:
            logits = _rectified_logits(raw[:, :num_classes], labels, self._log_prior, request)
        if spec.features != "off":
            assert self._calibration is not None
            rectified = rectify_features(raw[:, num_classes:].float(), labels, self._calibration, spec)
            features = to_float16(rectified, request.sample_ids, "features", LENGTH_REMEDY).numpy()
        return logits, features

    def _count_starts(self) -> int:
        """How often this replica had been started before within this run, from its own statistics."""
        with open(self._stats_file.name, encoding="utf-8") as file:
            return sum('"event": "start"' in line for line in file)

    def _after_forward(self, stats: EngineStats) -> None:
        self._write_stats("stats", stats)
        self._metrics.set(stats)

    def _write_stats(self, event: str, stats: EngineStats) -> None:
        row = {
            "event": event,
            "time": time.time(),
            "replica": self._spec.replica,
            "incarnation": self._incarnation,
            "restarted": self._restarted,
            "pid": os.getpid(),
            "calibration_forwards": self._calibration_forwards,
            **asdict(stats),
        }
        with self._stats_lock:
            self._stats_written = time.monotonic()
            self._stats_file.write(json.dumps(row) + "\n")
            self._stats_file.flush()


def _rectified_logits(
    raw: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor, request: TargetRequest
) -> Float16Array:
    """Rectified logits as float16; untouched bytes when nothing is to be rectified."""
    spec = request.rectifier
    if spec.tau_prior == 0 and not spec.exchange:
        return raw.contiguous().numpy()
    logits = rectify_logits(raw.float(), labels, log_prior, tau_prior=spec.tau_prior, exchange=spec.exchange)
    return to_float16(logits, request.sample_ids, "logits", PRIOR_REMEDY).numpy()


class _Metrics:
    """The counters under Ray's metrics, for Prometheus; names get the prefix `ray_` there."""

    NAMES = (
        *("forwards", "unique_views", "hits", "joined", "requests", "bytes_in", "bytes_out", "busy_s"),
        *("store_memory_bytes", "store_disk_bytes", "queue_peak_rows"),
    )

    def __init__(self, replica: int) -> None:
        tags = {"replica": str(replica)}
        self._gauges = {
            name: ray_metrics.Gauge(f"krd_teacher_{name}", tag_keys=("replica",)) for name in self.NAMES
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags(tags)

    def set(self, stats: EngineStats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))


def threads_for(num_cpus: float, chosen: int | None) -> int:
    """Returns the number of CPU threads of a process: as configured, else its CPUs rounded up, at least 1."""
    return chosen or max(1, math.ceil(num_cpus))


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """Returns the last statistics of every incarnation of every replica, in order of start."""
    last: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("stats-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = _parse(line)
            if row is not None:
                last[row["replica"], row["incarnation"]] = row
    return [last[key] for key in sorted(last)]


def _parse(line: str) -> dict[str, Any] | None:
    """A row, or None for the half line that a killed process may leave."""
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
