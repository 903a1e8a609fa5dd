"""Answers whether `compare` becomes exactly the students it stands for, and whether errors name the place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from krd_ray.config import CompareConfig, Resources
from krd_ray.config_io import apply_setting, dump_config, load_config, parse_config
from krd_ray.errors import ConfigError, ResourceError
from krd_ray.train.places import Node, check_run, heaviest

ROOT = Path(__file__).parents[2]


def raw(**over: Any) -> dict[str, Any]:
    return {
        "name": "c",
        "data": {"dir": "shards"},
        "teacher": {"weights": "t.safetensors"},
        "compare": {
            "seeds": [0, 7],
            "models": [
                {"model": "resnet8", "resources": {"num_cpus": 0.5}},
                {"model": "torchvision:resnet18", "workers": 2},
            ],
            "methods": {"ce": {}, "ce+kd": {"loss": {"kd": {"weight": 1}}, "train": {"epochs": 3}}},
        },
        **over,
    }


def test_every_combination_is_one_student_whole_seeds_first() -> None:
    config = parse_config(raw())
    assert [student.name for student in config.students] == [
        f"{method}.{model}.s{seed}"
        for seed in (0, 7)
        for model in ("resnet8", "torchvision_resnet18")
        for method in ("ce", "ce+kd")
    ]
    last = config.students[-1]
    assert (last.method, last.seed, last.model, last.workers) == ("ce+kd", 7, "torchvision:resnet18", 2)
    assert config.seed_of(last) == 7
    assert config.loss_of(last).kd.weight == 1
    assert config.train_of(last).epochs == 3
    assert config.students[0].resources.num_cpus == 0.5
    assert config.compare is None


def test_written_config_repeats_the_run_without_expanding_twice() -> None:
    config = parse_config(raw())
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config


def test_listed_students_stay_beside_compared_ones() -> None:
    config = parse_config(raw(students=[{"name": "mine", "model": "resnet20"}]))
    assert config.students[0].name == "mine"
    assert len(config.students) == 9


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "compare.methods.ce+kd.loss.kd.wieght=1",
            "compare.methods.ce+kd.loss.kd.wieght: unknown setting; did you mean `weight`?",
        ),
        ("compare.methods.ce.train.epochs=0", "compare.methods.ce.train.epochs"),
        ("compare.seeds=[]", "compare.seeds"),
        ("compare.methods={}", "compare.methods"),
        ("compare.models=[]", "compare.models"),
        ("compare.seed=[1]", "compare.seed: unknown setting; did you mean `seeds`?"),
        ("compare.seeds=[1,1]", "stands twice"),
        ("students_at_once=0", "students_at_once"),
        (f"compare.models=[{{model: resnet8, name: {'n' * 60}}}]", "give the model a shorter `name`"),
    ],
)
def test_mistake_is_named_by_its_place(setting: str, expected: str) -> None:
    config = raw()
    apply_setting(config, setting)
    with pytest.raises(ConfigError) as caught:
        parse_config(config)
    assert expected in caught.value.message


def test_fewer_students_at_once_reserve_the_heaviest_only() -> None:
    students = parse_config(raw()).students
    alone = [(student,) for student in students]
    assert {student.model for (student,) in heaviest(alone, 2)} == {"torchvision:resnet18"}
    assert len(heaviest(alone, None)) == 8
    pairs = list(zip(students[::2], students[1::2], strict=True))
    assert [len(process) for process in heaviest(pairs, 3)] == [2]
    assert len(heaviest(pairs, 1)) == 1, "one process at least"


def test_the_teacher_is_reserved_for_though_the_heaviest_students_need_none() -> None:
    config = parse_config(raw(students_at_once=1))
    check_run(config, config.students, [Node("n", {"CPU": 3.0})], streams=False)
    with pytest.raises(ResourceError, match=r"finds no place"):
        check_run(
            config, config.students, [Node("n", {"CPU": 2.0})], streams=False
        )  # two workers, and no room for the teacher


def test_a_light_student_that_no_node_can_take_is_found() -> None:
    config = parse_config(raw(students_at_once=1))
    odd = config.students[0].model_copy(update={"resources": Resources(num_cpus=0.1, custom={"box": 1})})
    with pytest.raises(ResourceError, match="box"):
        check_run(config, [odd, *config.students], [Node("n", {"CPU": 8.0})], streams=False)


@pytest.mark.parametrize("form", ["cpu", "gpu"], ids=["two-cores", "one-card"])
def test_the_quality_benchmark_fits_the_machine_it_is_for(form: str) -> None:
    machine = {"cpu": {"CPU": 2.0}, "gpu": {"CPU": 16.0, "GPU": 1.0}}[form]
    for path in sorted(ROOT.glob(f"benchmarks/quality/configs/{form}/*.yaml")):
        config = load_config(path)
        check_run(config, config.students, [Node("n", machine)], streams=True)


def test_no_field_of_a_compared_model_is_dropped() -> None:
    compare = CompareConfig.model_validate(raw()["compare"])
    assert [student.workers for student in compare.students()] == [1, 1, 2, 2] * 2


@pytest.mark.parametrize(
    "path",
    sorted(ROOT.glob("benchmarks/quality/configs/*/*.yaml")),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_configs_of_the_quality_benchmark_are_whole(path: Path) -> None:
    config = load_config(path)
    assert len({student.name for student in config.students}) == len(config.students)
    for student in config.students:
        assert config.loss_of(student).needs_teacher <= (config.teacher is not None)
        assert student.method is not None or path.stem.endswith("teacher")


def test_a_student_whose_name_holds_dots_can_be_set() -> None:
    config = {"students": [{"name": "ce.resnet8.s0"}, {"name": "ce.resnet8.s0.more"}, {"name": "plain"}]}
    apply_setting(config, "students.ce.resnet8.s0.train.lr=0.5")
    apply_setting(config, "students.ce.resnet8.s0.more.model=resnet20")
    apply_setting(config, "students.plain.model=resnet32")
    assert config["students"][0] == {"name": "ce.resnet8.s0", "train": {"lr": 0.5}}
    assert config["students"][1]["model"] == "resnet20"
    assert config["students"][2]["model"] == "resnet32"
    with pytest.raises(ConfigError, match="there is no element 'ce'"):
        apply_setting(config, "students.ce.resnet9.s0.model=x")
