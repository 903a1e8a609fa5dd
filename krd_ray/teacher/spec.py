"""Answers what a teacher is made of and which name its answers go by: weights, views, shards, budgets, places.

Does not serve and does not forward.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from krd_ray.data.shard_set import ShardSet
from krd_ray.maths.priors import PriorKind
from krd_ray.maths.views import ViewSpec
from krd_ray.models.outputs import feature_dim_of
from krd_ray.storage.node_copies import node_folder
from krd_ray.teacher.recorded import Compile
from krd_ray.teacher.weights import ModelCard, hash_state, load_model


@dataclass(frozen=True)
class TeacherSpec:
    """All that a replica needs to start, and to start again after a crash; picklable and small.

    Args:
        weights, model: as in the config; absolute path, or URI.
        view: what the students see.
        shards: the training split; with cached blocks, a replica looks pixels up by itself.
        dataset_hash: content hash of the shards; answers kept from other images are not used.
        class_counts: n_c of the training split.
        replica, num_replicas: which share of the samples this process is the home of.
        micro_batch, queue_rows, memory_bytes, disk_bytes, persist, precision, compile, num_threads: as in the config.
        device: `cpu` or `cuda`.
        store_dir: folder of the target store; local to the node for speed. For a URI each replica has a folder on its
            node, and a persistent store is kept at the URI between runs.
        run_dir: the run's `teacher` folder, for statistics and the self-test; path or URI.
        calibration: file of the calibration pass, path or URI; one of another teacher is made again.
        priors: kinds of balanced priors that students will ask for; found at start, not in the first request.
        known_as: name in the statistics.
        owns_process: False for a replica inside a student's process, whose CPU time the student counts.
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
    compile: Compile
    num_threads: int
    device: str
    store_dir: str
    run_dir: str
    calibration: str
    priors: tuple[PriorKind, ...] = ()
    known_as: str | int | None = None
    owns_process: bool = True

    @property
    def name(self) -> str | int:
        """Returns what the statistics call this replica."""
        return self.replica if self.known_as is None else self.known_as


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher's network with what it is known by.

    Args:
        net: in eval mode on the CPU.
        card: what the weights say of themselves.
        model: registry name.
        teacher_hash: of everything that decides its outputs.
        feature_dim: D_t.
    """

    net: nn.Module
    card: ModelCard | None
    model: str
    teacher_hash: str
    feature_dim: int


def load_teacher(spec: TeacherSpec) -> LoadedTeacher:
    """Loads the weights and names the teacher.

    Raises:
        TeacherError: as `load_model`.
        ConfigError: no model of that name.
    """
    net, card = load_model(
        spec.weights, model=spec.model, num_classes=len(spec.class_counts), image_size=spec.view.side
    )
    model = spec.model or (card.model if card else "")
    teacher_hash = hash_state(
        net.state_dict(),
        model,
        spec.view.key(),
        f"{spec.shards.side} {spec.micro_batch}",
        f"{card.mean}{card.std}" if card else "",
        spec.precision,
        spec.compile,
        spec.device,
    )
    return LoadedTeacher(net, card, model, teacher_hash, feature_dim_of(net))


def store_key(spec: TeacherSpec, teacher_hash: str) -> str:
    """Returns the name of a store's content: another teacher, view, dataset or split of samples has another one."""
    return hashlib.sha256(f"{teacher_hash} {spec.dataset_hash} {spec.num_replicas}".encode()).hexdigest()


def store_folder(spec: TeacherSpec, teacher_hash: str, replica: int) -> Path:
    """Returns the folder of one replica's store on this node."""
    return node_folder(spec.store_dir) / f"replica-{replica}-{store_key(spec, teacher_hash)[:16]}"


def threads_for(num_cpus: float, chosen: int | None) -> int:
    """Returns the number of CPU threads of a process: as configured, else its CPUs rounded up, at least 1."""
    return chosen or max(1, math.ceil(num_cpus))
