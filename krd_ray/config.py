"""Answers what a run is made of: every setting with its type, range and its one default.

Does not read files (`config_io` does) and does not check the cluster or the data.
A YAML key, a `--set a.b=c` and a search-space parameter are the same dotted name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from krd_ray.config_loss import Count, Fraction, LossConfig, NonNegative, Positive, Strict
from krd_ray.config_resources import Resources as Resources
from krd_ray.config_resources import SoftStrategy, Strategy

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$"
MAX_NAME = 64
STRATEGY = (
    "workers: on few nodes, or SPREAD over many; STRICT_PACK: on one node, STRICT_SPREAD: on a node each"
)
METHOD = r"^[A-Za-z0-9][A-Za-z0-9_+-]{0,31}$"


class DataConfig(Strict):
    """Where the shards are and how they are read."""

    dir: str = Field(description="folder or URI with dataset.json, written by `krd shards`")
    image_size: Count | None = Field(None, description="side to decode to; null: as dataset.json says")
    cache: Literal["auto", "memory", "stream"] = Field(
        "auto", description="memory: decode once into Ray's object store; stream: read shards every epoch"
    )
    cache_limit_frac: Fraction = Field(0.3, description="auto: memory up to this share of the object store")
    shuffle_rows: Count = Field(65_536, description="rows of the shuffle window on top of the chunk shuffle")
    verify: Literal["auto", "fast", "full"] = Field(
        "auto", description="full: checksum each shard; fast: sizes and footers; auto: full below 1 GiB"
    )


class ViewsConfig(Strict):
    """How an image becomes a training view; teacher and students see the same pixels."""

    recipe: Literal["auto", "none", "pad_crop", "random_resized_crop"] = "auto"
    side: Count | None = Field(None, description="side of the view in pixels; null: the image's own")
    pad: Annotated[int, Field(ge=0)] | None = Field(None, description="pad_crop: pixels; null: side / 8")
    flip: bool = True
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    seed: int | None = Field(None, description="null: the run's seed")
    cycle: Count | None = Field(
        None, description="number of different views per image; null: a new one each epoch"
    )


class TeacherConfig(Strict):
    """The served teacher: its weights, its processes, its memory."""

    weights: str = Field(description="*.safetensors, or a state_dict file (*.pt, *.pth); path or URI")
    model: str | None = Field(None, description="model name; null: as the safetensors file says")
    placement: Literal["actors", "in_process", "stored"] = Field(
        "actors",
        description="actors: shared by all students; in_process: inside each process of students, for one process "
        "with fresh views; stored: no teacher, all targets from a store filled by `krd targets`",
    )
    replicas: Count = 1
    resources: Resources = Resources()
    strategy: SoftStrategy = Field("PACK", description="replicas: on few nodes, or SPREAD over many")
    micro_batch: Count = Field(
        64, description="rows of one forward; always this many, so shapes never change"
    )
    queue_rows: Count = Field(
        8192, description="rows that may wait for a forward before requests are held back"
    )
    memory_bytes: Count = Field(1 << 30, description="target store in memory, per replica")
    disk_bytes: Annotated[int, Field(ge=0)] = Field(8 << 30, description="target store on disk, per replica")
    spill_dir: str | None = Field(
        None,
        description="folder of the target store; null: <run_dir>/teacher/store; a URI with persist: where it is kept "
        "between runs",
    )
    persist: bool = Field(
        False, description="keep the store on disk, so that a restarted teacher starts warm"
    )
    timeout_s: Positive = Field(
        300.0, description="a student waits this long for an answer, restarts included"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on GPU, fp32 on CPU")
    compile: Literal["auto", "off", "cuda_graph", "inductor"] = Field(
        "auto",
        description="cuda_graph: record the forward once, replay it; inductor: torch.compile it before, which "
        "needs a C++ compiler or Triton; auto: cuda_graph on GPU, off on CPU",
    )
    num_threads: Count | None = Field(None, description="CPU threads; null: num_cpus rounded up")
    min_accuracy: Fraction | None = Field(
        None, description="self-test on training images; null: twice the accuracy of guessing"
    )

    @model_validator(mode="after")
    def _has_a_store_to_read(self) -> TeacherConfig:
        if self.placement == "stored" and not (self.persist and self.spill_dir):
            raise ValueError(
                "placement `stored` reads a store that `krd targets` filled: set persist to true and spill_dir to "
                "its folder"
            )
        return self


class SamplerConfig(Strict):
    """How often an epoch shows a sample: by class, with the epoch's length kept."""

    name: Literal["instance_balanced", "square_root", "class_balanced"] = "instance_balanced"
    from_epoch: Annotated[int, Field(ge=0)] = Field(
        0, description="instance-balanced before this epoch (deferred re-sampling)"
    )


class TrainConfig(Strict):
    """The loop: the same for a teacher, a baseline and a student."""

    epochs: Count = 100
    batch_size: Count = Field(128, description="per worker")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: tuple[int, ...] = Field((), description="step: epochs after which lr is multiplied by gamma")
    gamma: Positive = 0.1
    warmup_epochs: NonNegative = 0.0
    clip_norm: Positive | None = None
    sampler: SamplerConfig = SamplerConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on GPU, fp32 on CPU"
    )
    channels_last: bool | None = Field(
        None, description="memory layout of weights and activations; null: true, on GPU and CPU"
    )
    in_flight: Count | None = Field(
        None,
        description="target requests out while a batch is in training, per worker; null: by measured latency",
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="worker restarts before the student fails"
    )
    val_every_epochs: Count = 1
    checkpoint_every_epochs: Count = Field(1, description="the last epoch is always checkpointed")
    progress_every_s: Positive = 1.0
    num_threads: Count | None = Field(None, description="CPU threads; null: num_cpus rounded up")
    niceness: Annotated[int, Field(ge=0, le=19)] = Field(
        10,
        description="on CPUs, how far students stand back behind the teacher and the readers they wait for",
    )

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainConfig:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0; set nesterov to false")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule `step` needs milestones, the epochs after which lr falls")
        return self


class StudentConfig(Strict):
    """One student; `loss` and `train` hold only what differs from the run's."""

    name: Annotated[str, Field(pattern=NAME)]
    model: str
    method: str | None = Field(None, description="name that tables group seeds under; null: the loss's label")
    workers: Count = 1
    resources: Resources = Resources()
    strategy: Strategy = Field("PACK", description=STRATEGY)
    seed: int | None = Field(None, description="of weights and of the samples' order; null: the run's seed")
    loss: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class MethodConfig(Strict):
    """One method of a comparison: what differs from the run's `loss` and `train`."""

    loss: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class ComparedModel(Strict):
    """One student model of a comparison."""

    model: str
    name: Annotated[str, Field(pattern=NAME)] | None = Field(None, description="null: the model's name")
    workers: Count = 1
    resources: Resources = Resources()
    strategy: Strategy = Field("PACK", description=STRATEGY)


class CompareConfig(Strict):
    """Every method with every model and every seed: each combination becomes a student of the run."""

    methods: Annotated[dict[Annotated[str, Field(pattern=METHOD)], MethodConfig], Field(min_length=1)]
    models: Annotated[list[ComparedModel], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1, default_factory=lambda: [0])]

    @model_validator(mode="after")
    def _names_are_short(self) -> CompareConfig:
        names = [self._name(method, entry, seed) for seed, entry, method in self._combinations()]
        longest = max(names, key=len)
        if len(longest) > MAX_NAME:
            raise ValueError(
                f"the student's name {longest} has {len(longest)} characters, at most {MAX_NAME} are allowed; "
                "give the model a shorter `name`"
            )
        return self

    def _combinations(self) -> list[tuple[int, ComparedModel, str]]:
        return [
            (seed, entry, method) for seed in self.seeds for entry in self.models for method in self.methods
        ]

    @staticmethod
    def _name(method: str, entry: ComparedModel, seed: int) -> str:
        return f"{method}.{entry.name or re.sub('[^A-Za-z0-9_-]', '_', entry.model)}.s{seed}"

    def students(self) -> list[StudentConfig]:
        """Returns one student per combination, named method.model.s0; seeds are outermost, so that a comparison
        that is cut short has whole seeds."""
        return [
            StudentConfig(
                name=self._name(method, entry, seed),
                method=method,
                seed=seed,
                **entry.model_dump(exclude={"name"}),
                **self.methods[method].model_dump(),
            )
            for seed, entry, method in self._combinations()
        ]


class RayConfig(Strict):
    """How the driver meets a cluster."""

    address: str | None = Field(
        None,
        description="`auto` or host:port: join that cluster; null: in a Ray job that of the job, else start one here",
    )
    num_cpus: Positive | None = Field(
        None, description="logical CPUs of a cluster started here; null: its cores"
    )
    object_store_bytes: Count | None = None


def _no_null_list(value: Any) -> Any:
    return [] if value is None else value


class RunConfig(Strict):
    """One run: shards, an optional teacher, students that train together."""

    name: Annotated[str, Field(pattern=NAME)]
    seed: int = 0
    run_dir: str | None = Field(None, description="path or URI; null: runs/<name>-<time>")
    data: DataConfig
    views: ViewsConfig = ViewsConfig()
    teacher: TeacherConfig | None = None
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    students: Annotated[list[StudentConfig], BeforeValidator(_no_null_list), Field(default_factory=list)]
    compare: CompareConfig | None = Field(None, description="methods x models x seeds, added to students")
    students_at_once: Count | None = Field(
        None, description="students that train at the same time; null: all of them"
    )
    students_per_process: Count = Field(
        1,
        description="students that share a process, and train in step there, where they agree in seed, workers, "
        "resources and the settings of their batches: each batch is read, made into a view and asked for once",
    )
    ray: RayConfig = RayConfig()
    evaluate: bool = Field(True, description="read the test split once at the end of the run")

    @model_validator(mode="after")
    def _students_fit_together(self) -> RunConfig:
        if not self.students and self.compare is None:
            raise ValueError(
                "at least one student is required: list `students`, or give `compare`, which makes them"
            )
        names = [student.name for student in self.students]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"students must have different names; {', '.join(doubled)} stands twice")
        if self.teacher is not None and "teacher" in names:
            raise ValueError("a student may not be called `teacher` in a run that has one")
        if self.teacher is not None and self.teacher.placement == "stored" and self.views.cycle is None:
            raise ValueError(
                "teacher.placement `stored` holds a number of views: set views.cycle to that of `krd targets`"
            )
        self._refuse_teachers_that_repeat_each_other()
        return self

    def _refuse_teachers_that_repeat_each_other(self) -> None:
        """Samples move between the workers of a student, so each worker's own teacher would compute cycled views."""
        if self.teacher is None or self.teacher.placement != "in_process" or self.views.cycle is None:
            return
        for student in self.students:
            if student.workers > 1:
                raise ValueError(
                    f"teacher.placement `in_process` with views.cycle computes every view once in each of the "
                    f"{student.workers} workers of students.{student.name}; set it to actors, or views.cycle to null"
                )

    @property
    def on_cpu(self) -> bool:
        """No process of the run reserves a GPU."""
        resources = [student.resources for student in self.students]
        resources += [self.teacher.resources] if self.teacher else []
        return all(each.num_gpus == 0 for each in resources)

    def expanded(self) -> RunConfig:
        """Returns the config with the comparison's students written out."""
        if self.compare is None:
            return self
        students = [*self.students, *self.compare.students()]
        return RunConfig.model_validate({**self.model_dump(), "students": students, "compare": None})

    def loss_of(self, student: StudentConfig) -> LossConfig:
        """Returns the run's loss with the student's own settings over it."""
        return LossConfig.model_validate(merge(self.loss.model_dump(), student.loss))

    def train_of(self, student: StudentConfig) -> TrainConfig:
        """Returns the run's training settings with the student's own over them."""
        return TrainConfig.model_validate(merge(self.train.model_dump(), student.train))

    def seed_of(self, student: StudentConfig) -> int:
        """Returns the student's seed, else the run's."""
        return self.seed if student.seed is None else student.seed


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns `base` with `over` laid on top, mapping by mapping; inputs stay as they are.

    Example:
        >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
        {'a': {'b': 1, 'c': 3}}
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
