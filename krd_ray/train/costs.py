"""Answers what one image costs on this machine: a forward of the teacher, a training step of each kind of student.

Does not start Ray and does not plan (`planner` does). Everything is measured in this one process, one network after
the other, on the first rows of the real shards; reading, decoding and the exchange of gradients are not part of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
import torch

from krd_ray.config import Resources, RunConfig, StudentConfig, TrainConfig
from krd_ray.data.plan import Piece
from krd_ray.data.reading import block_arrays, read_piece
from krd_ray.data.shard_set import Batch, ShardSet
from krd_ray.errors import ResourceError
from krd_ray.maths.samplers import INSTANCE_BALANCED, view_of_copy
from krd_ray.maths.transfer import on_device
from krd_ray.maths.views import train_view
from krd_ray.models.outputs import feature_dim_of
from krd_ray.teacher.forward import TeacherForward
from krd_ray.teacher.spec import threads_for
from krd_ray.teacher.weights import load_model
from krd_ray.train.descent import Descent
from krd_ray.train.epoch_rows import EpochRows, RowSettings
from krd_ray.train.objective import StepTargets, class_weights_at, objective_terms, rectifier_for
from krd_ray.train.prepare import Prepared
from krd_ray.train.reduce import all_finite
from krd_ray.train.student import build_student, layout_of

WARM_UP_FRAC = 0.25  # of the time of measuring, spent before it
WARM_UP_STEPS, MIN_STEPS = 2, 5
LEARNING_RATE = (
    1e-6  # the same rows again and again, with targets drawn at random: the weights are to stay sane
)
# Settings of training that no step's cost depends on.
COSTLESS = {"epochs", "lr", "schedule", "milestones", "gamma", "warmup_epochs", "sampler", "in_flight"} | {
    "max_failures", "val_every_epochs", "checkpoint_every_epochs", "progress_every_s",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one image costs in one process.

    Args:
        seconds: CPU seconds on a CPU, seconds of the card on a GPU; > 0, median over steps.
        device: `cpu` or `cuda`.
        num_threads: CPU threads of torch while it was measured.
    """

    seconds: float
    device: str
    num_threads: int


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Args:
        teacher: C_T, of a forward with its view; None when nobody learns from a teacher.
        teacher_width: values of one answer, C + D_t; 0 without a teacher.
        students: C_i, of a whole training step, by student.
    """

    teacher: Cost | None
    teacher_width: int
    students: dict[str, Cost]


def measure_costs(prepared: Prepared, *, seconds: float, say: Callable[[str], None]) -> Costs:
    """Measures the teacher and every different student for some seconds each; warm-up comes on top.

    Args:
        prepared: the checked run.
        seconds: of measuring per network; at least MIN_STEPS steps are taken whatever they last.
        say: gets a line before each measurement.
    Raises:
        ResourceError: the config wants a GPU, and there is none here.
    """
    config = prepared.config
    _check_devices(config)
    num_threads = torch.get_num_threads()
    teacher, width, costs = None, 0, {}
    try:
        if config.teacher is not None and taught_of(config):
            teacher, width = _teacher_cost(prepared, seconds, say)
        known: dict[str, Cost] = {}
        for student in config.students:
            kind = _kind_of(config, student)
            if kind not in known:
                known[kind] = _student_cost(prepared, student, width, seconds, say)
            costs[student.name] = known[kind]
    finally:
        torch.set_num_threads(num_threads)
    return Costs(teacher, width, costs)


def taught_of(config: RunConfig) -> list[StudentConfig]:
    """Returns the students that learn from a teacher."""
    return [student for student in config.students if config.loss_of(student).needs_teacher]


def num_gpus_here() -> int:
    """Returns the number of GPUs that torch finds on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def first_rows(shards: ShardSet, num_rows: int) -> Batch:
    """Returns the first rows of a split, from the start again where it has fewer; reads files, without Ray."""
    parts: list[Batch] = []
    for chunk, rows in enumerate(shards.chunk_rows):
        missing = num_rows - sum(map(len, parts))
        if missing > 0:
            table = read_piece(shards, Piece(chunk, 0, min(rows, missing)))
            parts.append(block_arrays(table, shards.side))
    index = np.arange(num_rows) % sum(map(len, parts))
    return Batch(
        np.concatenate([part.sample_ids for part in parts])[index],
        np.concatenate([part.labels for part in parts])[index],
        np.concatenate([part.images_BHWC for part in parts])[index],
        np.zeros(num_rows, np.int64),
    )


def count_views(prepared: Prepared, students: Iterable[StudentConfig]) -> int:
    """Returns how many different (view, image) pairs these students train on in the whole run: forwards, at best.

    Student i shows each image min(M, E_i) views (M: `views.cycle`, E_i: its epochs), and the views of a shorter
    training are among those of a longer one. A sampler's copies take further views; they are counted one by one.
    """
    config, num_rows = prepared.config, prepared.train.num_rows
    seen: dict[int, npt.NDArray[np.bool_]] = {}
    done: set[tuple[str, int]] = set()
    for student in students:
        train, seed = config.train_of(student), config.seed_of(student)
        plain = train.sampler.name == INSTANCE_BALANCED
        kind = (f"{train.sampler} {train.epochs} {student.workers}", 0 if plain else seed)
        if kind in done:
            continue
        done.add(kind)
        rows = None if plain else _epoch_rows(prepared, student, train)
        for epoch in range(train.epochs):
            times = np.ones(num_rows, np.int64) if rows is None else rows.plan(epoch).times
            views = view_of_copy(np.arange(times.max()), epoch=epoch, cycle=config.views.cycle)
            for copy, view in enumerate(views.tolist()):
                seen.setdefault(view, np.zeros(num_rows, np.bool_))[times > copy] = True
    return sum(int(each.sum()) for each in seen.values())


def _epoch_rows(prepared: Prepared, student: StudentConfig, train: TrainConfig) -> EpochRows:
    config = prepared.config
    settings = RowSettings(
        sampler=train.sampler,
        class_counts=prepared.class_counts,
        seed=config.seed_of(student),
        batch_size=train.batch_size,
        window_rows=config.data.shuffle_rows,
        cycle=config.views.cycle,
        rank=0,
        world=student.workers,
    )
    return EpochRows(prepared.train, settings)


def _check_devices(config: RunConfig) -> None:
    wanted: dict[str, Resources] = {f"students.{each.name}": each.resources for each in config.students}
    if config.teacher is not None and taught_of(config):
        wanted["teacher"] = config.teacher.resources
    on_gpu = [name for name, resources in wanted.items() if resources.num_gpus > 0]
    if on_gpu and not torch.cuda.is_available():
        raise ResourceError(
            f"{', '.join(on_gpu)} are to compute on a GPU (resources.num_gpus), but torch finds none here; "
            "plan on a machine like those of the run, or set num_gpus to 0"
        )


def _device_of(resources: Resources) -> str:
    return "cuda" if resources.num_gpus > 0 else "cpu"


def _kind_of(config: RunConfig, student: StudentConfig) -> str:
    """A name for all that decides a student's cost."""
    train = config.train_of(student)
    threads = threads_for(student.resources.num_cpus, train.num_threads)
    settings = train.model_dump(exclude=COSTLESS)
    return f"{student.model} {_device_of(student.resources)} {threads} {settings} {config.loss_of(student)}"


def _teacher_cost(prepared: Prepared, seconds: float, say: Callable[[str], None]) -> tuple[Cost, int]:
    """C_T, and the values of one answer: full micro-batches, a new view each time."""
    config = prepared.config.teacher
    assert config is not None
    assert config.compile != "auto"
    num_classes = len(prepared.class_counts)
    net, card = load_model(
        config.weights, model=config.model, num_classes=num_classes, image_size=prepared.view.side
    )
    device = _device_of(config.resources)
    say(f"measuring the teacher, {config.model or (card.model if card else '')}, on {device}")
    forward = TeacherForward(
        net,
        card,
        prepared.view,
        device=torch.device(device),
        bf16=config.precision == "bf16",
        micro_batch=config.micro_batch,
        compile=config.compile,
    )
    rows, views = first_rows(prepared.train, config.micro_batch), itertools.count()

    def step() -> None:
        forward(rows.images_BHWC, rows.sample_ids, np.full(len(rows), next(views)))

    threads = threads_for(config.resources.num_cpus, config.num_threads)
    return _cost(step, len(rows), device, threads, seconds), num_classes + feature_dim_of(net)


def _student_cost(
    prepared: Prepared, student: StudentConfig, width: int, seconds: float, say: Callable[[str], None]
) -> Cost:
    train, device = prepared.config.train_of(student), _device_of(student.resources)
    loss = prepared.config.loss_of(student)
    say(f"measuring a student, {student.model} with {loss.label()}, on {device}")
    rows = first_rows(prepared.train, min(train.batch_size, prepared.train.num_rows))
    step = _StudentStep(prepared, student, rows, width - len(prepared.class_counts))
    return _cost(step, len(rows), device, threads_for(student.resources.num_cpus, train.num_threads), seconds)


class _StudentStep:
    """One training step as `loop` takes it, on the same rows each time; targets of the right shapes are drawn.

    Args:
        prepared: the run.
        student: whose step.
        rows: its batch.
        teacher_dim: D_t; not used where the loss compares no features.
    """

    def __init__(self, prepared: Prepared, student: StudentConfig, rows: Batch, teacher_dim: int) -> None:
        config, num_classes = prepared.config, len(prepared.class_counts)
        self._train, self._loss = config.train_of(student), config.loss_of(student)
        self._view, self._rows = prepared.view, rows
        self._device = torch.device(_device_of(student.resources))
        built = build_student(
            student.model,
            num_classes=num_classes,
            side=prepared.view.side,
            seed=config.seed_of(student),
            teacher_dim=teacher_dim if self._loss.needs_features else None,
        )
        self._module = built.to(self._device, memory_format=layout_of(self._train)).train()  # type: ignore[call-overload]
        slow = self._train.model_copy(update={"lr": LEARNING_RATE})
        self._descent = Descent(self._module, slow, self._device)
        self._class_counts = torch.tensor(prepared.class_counts, device=self._device)
        self._targets = self._draw_targets(num_classes, teacher_dim)
        self._views = itertools.count()

    def __call__(self) -> None:
        rows, device = self._rows, self._device
        labels = on_device(rows.labels, device)
        drawn = (rows.images_BHWC, rows.sample_ids, np.full(len(rows), next(self._views)))
        images, ids, index = (on_device(each, device) for each in drawn)
        view = train_view(images, ids, index, self._view).contiguous(memory_format=layout_of(self._train))
        with self._descent.autocast():
            logits, projected = self._module(view)
        terms = objective_terms(
            self._loss,
            student_logits=logits,
            projected=projected,
            labels=labels,
            class_counts=self._class_counts,
            class_weights=class_weights_at(self._loss.classification, self._class_counts, 0),
            targets=self._to_device(),
        )
        all_finite(torch.stack(list(terms.values())).tolist(), device)
        self._descent.step(terms["loss"])

    def _draw_targets(self, num_classes: int, teacher_dim: int) -> Sequence[npt.NDArray[np.float16] | None]:
        rectifier = rectifier_for(self._loss)
        if rectifier is None:
            return ()
        draw, num_rows = np.random.default_rng(0), len(self._rows)
        logits = draw.standard_normal((num_rows, num_classes)).astype(np.float16)
        features = draw.standard_normal((num_rows, teacher_dim)).astype(np.float16)
        return (
            logits if rectifier.send_logits else None,
            features if rectifier.features != "off" else None,
        )

    def _to_device(self) -> StepTargets | None:
        if not self._targets:
            return None
        return StepTargets(
            *(None if part is None else on_device(part, self._device) for part in self._targets)
        )


def _cost(step: Callable[[], None], num_rows: int, device: str, num_threads: int, seconds: float) -> Cost:
    """Warms up, then takes the median step."""
    torch.set_num_threads(num_threads)
    clock = _clock_of(device, num_threads)
    _time_steps(step, clock, seconds=WARM_UP_FRAC * seconds, at_least=WARM_UP_STEPS)
    took_s = _time_steps(step, clock, seconds=seconds, at_least=MIN_STEPS)
    return Cost(median(took_s) / num_rows, device, num_threads)


def _clock_of(device: str, num_threads: int) -> Callable[[], float]:
    """The clock that the run's own ledger reads on a CPU; on a GPU, time with nothing left in the card's queue."""
    if device == "cpu":
        return time.thread_time if num_threads == 1 else time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _time_steps(
    step: Callable[[], None], clock: Callable[[], float], *, seconds: float, at_least: int
) -> list[float]:
    took_s: list[float] = []
    end = time.perf_counter() + seconds
    while len(took_s) < at_least or time.perf_counter() < end:
        before = clock()
        step()
        took_s.append(clock() - before)
    return took_s
