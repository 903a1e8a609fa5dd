"""Answers whether a run can start: the data is whole, nothing is left on `auto`, the parts fit each other.

Does not touch Ray; everything here fails before a cluster is asked for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from krd_ray.config import RunConfig, StudentConfig, TrainConfig, ViewsConfig
from krd_ray.data.manifest import Manifest
from krd_ray.data.shard_set import ShardSet
from krd_ray.data.verify import verify_dataset
from krd_ray.errors import ConfigError
from krd_ray.maths.views import ViewSpec
from krd_ray.models.registry import describe_model
from krd_ray.storage.places import absolute, is_uri
from krd_ray.teacher.weights import load_model

FULL_CHECK_BYTES = 1 << 30
SMALL_SIDE = 64


@dataclass(frozen=True)
class Prepared:
    """A checked run: the config with views and precision decided, manifest, view, splits.

    `data.cache` and `data.verify` stay as they are: they are about this machine, not about the result.
    """

    config: RunConfig
    manifest: Manifest
    view: ViewSpec
    train: ShardSet
    val: ShardSet | None

    def for_students(self, students: Sequence[StudentConfig]) -> Prepared:
        """Returns the same run with other students; they must have been checked."""
        return replace(self, config=self.config.model_copy(update={"students": list(students)}))

    @property
    def class_counts(self) -> tuple[int, ...]:
        return tuple(self.manifest.splits["train"].class_counts)


def prepare(config: RunConfig) -> Prepared:
    """Checks data, models and weights, and decides what depends on the data or the device.

    Raises:
        DataError: shards missing, damaged or of another size than asked for.
        ConfigError: unknown model, a student that needs a teacher without one, settings that contradict.
        TeacherError: weights that cannot be read or do not fit.
    """
    _check_places(config)
    root = absolute(config.data.dir)
    manifest = _verified(config, root)
    train = ShardSet.open(root, manifest, "train", side=config.data.image_size)
    resolved = _resolve(config, root, train.side)
    view = _view_spec(resolved, manifest)
    has_val = "val" in manifest.splits and manifest.splits["val"].num_rows > 0
    val = ShardSet.open(root, manifest, "val", side=train.side) if has_val else None
    for student in resolved.students:
        describe_model(student.model, num_classes=manifest.num_classes, image_size=view.side)
        _check_objective(resolved, student)
    if resolved.teacher is not None:
        load_model(
            resolved.teacher.weights,
            model=resolved.teacher.model,
            num_classes=manifest.num_classes,
            image_size=view.side,
        )
    return Prepared(resolved, manifest, view, train, val)


def _check_places(config: RunConfig) -> None:
    teacher = config.teacher
    if teacher is not None and not teacher.persist and is_uri(teacher.spill_dir or ""):
        raise ConfigError(
            f"teacher.spill_dir is {teacher.spill_dir}, but what a teacher spills while it works lies on a disk of "
            "its node: set it to a folder, or teacher.persist to true for a store that is kept there between runs"
        )


def _verified(config: RunConfig, root: str) -> Manifest:
    splits = Manifest.load(root).splits.values()
    small = sum(shard.num_bytes for split in splits for shard in split.shards) < FULL_CHECK_BYTES
    verify = config.data.verify
    return verify_dataset(root, full=verify == "full" or (verify == "auto" and small))


def _check_objective(config: RunConfig, student: StudentConfig) -> None:
    if config.teacher is None and config.loss_of(student).needs_teacher:
        raise ConfigError(
            f"students.{student.name}: {config.loss_of(student).label()} needs soft targets, but teacher is null; "
            "set teacher.weights, or kd.weight, rrd.weight and lrd.weight to 0"
        )
    if config.train_of(student).precision == "fp16" and student.resources.num_gpus == 0:
        raise ConfigError(f"students.{student.name}: train.precision fp16 needs a GPU; use fp32 or bf16")
    if student.workers > 1 and 0 < student.resources.num_gpus < 1:
        raise ConfigError(
            f"students.{student.name}: {student.workers} workers with {student.resources.num_gpus} GPU each; "
            "two NCCL ranks must not share a GPU: give each worker a whole one, or use one worker"
        )


def _resolve(config: RunConfig, root: str, image_side: int) -> RunConfig:
    """The config with every computed default written out, so that it repeats the run by itself."""
    update = {
        "data": config.data.model_copy(update={"dir": root, "image_size": image_side}),
        "views": _resolve_views(config.views, config.seed, image_side),
        "students": [resolve_student(config, student) for student in config.students],
    }
    if config.teacher is not None:
        gpu = config.teacher.resources.num_gpus > 0
        precision, how = config.teacher.precision, config.teacher.compile
        update["teacher"] = config.teacher.model_copy(
            update={
                "weights": absolute(config.teacher.weights),
                "precision": ("bf16" if gpu else "fp32") if precision == "auto" else precision,
                "compile": ("cuda_graph" if gpu else "off") if how == "auto" else how,
            }
        )
    return config.model_copy(update=update)


def _resolve_views(views: ViewsConfig, seed: int, image_side: int) -> ViewsConfig:
    side = views.side or image_side
    recipe = views.recipe
    if recipe == "auto":
        recipe = "pad_crop" if side <= SMALL_SIDE else "random_resized_crop"
    return views.model_copy(
        update={
            "side": side,
            "recipe": recipe,
            "pad": side // 8 if views.pad is None else views.pad,
            "seed": seed if views.seed is None else views.seed,
        }
    )


def resolve_student(config: RunConfig, student: StudentConfig) -> StudentConfig:
    """Returns the student with precision and memory layout decided for its device."""
    train = resolve_train(config.train_of(student), gpu=student.resources.num_gpus > 0)
    own = {"precision": train.precision, "channels_last": train.channels_last}
    return student.model_copy(update={"train": {**student.train, **own}})


def resolve_train(train: TrainConfig, *, gpu: bool) -> TrainConfig:
    """Returns the settings with precision and memory layout decided for the device."""
    precision = ("bf16" if gpu else "fp32") if train.precision == "auto" else train.precision
    channels_last = True if train.channels_last is None else train.channels_last
    return train.model_copy(update={"precision": precision, "channels_last": channels_last})


def _view_spec(config: RunConfig, manifest: Manifest) -> ViewSpec:
    views = config.views
    assert views.side is not None
    assert views.pad is not None
    assert views.seed is not None
    assert views.recipe != "auto"
    return ViewSpec(
        recipe=views.recipe,
        side=views.side,
        pad=views.pad,
        flip=views.flip,
        scale=views.scale,
        ratio=views.ratio,
        brightness=views.brightness,
        contrast=views.contrast,
        saturation=views.saturation,
        seed=views.seed,
        mean=_three(manifest.mean),
        std=_three(manifest.std),
    )


def _three(values: list[float] | tuple[float, ...]) -> tuple[float, float, float]:
    first, second, third = values
    return (first, second, third)
