"""Answers whether settings are checked as strictly as promised, and read back as they were written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector  # only here: the words must stay Ray's own

from krd_ray.config import Resources, RunConfig, merge
from krd_ray.config_io import apply_setting, dump_config, load_config, parse_config
from krd_ray.config_resources import has_labels
from krd_ray.errors import ConfigError
from krd_ray.models.registry import describe_model

ROOT = Path(__file__).parents[2]
PRESETS = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "krd_ray" / "demo").glob("*.yaml"))]


def raw_config(**more: Any) -> dict[str, Any]:
    """The smallest mapping that is a config, with two students."""
    students = [{"name": "small", "model": "resnet8"}, {"name": "large", "model": "resnet20"}]
    return {"name": "run", "data": {"dir": "shards"}, "students": students, **more}


def write_yaml(folder: Path, raw: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.message


@pytest.mark.parametrize(
    ("raw", "dotted", "nearest"),
    [
        (raw_config(studnets=[]), "studnets", "students"),
        (raw_config(train={"epoch": 3}), "train.epoch", "epochs"),
        (raw_config(loss={"lrd": {"temprature": 2}}), "loss.lrd.temprature", "temperature"),
        (raw_config(teacher={"weights": "w", "replica": 2}), "teacher.replica", "replicas"),
        (
            raw_config(teacher={"weights": "w", "resources": {"cpus": 1}}),
            "teacher.resources.cpus",
            "num_cpus",
        ),
        (raw_config(students=[{"name": "s", "model": "m", "sed": 1}]), "students.0.sed", "seed"),
    ],
)
def test_unknown_setting_is_refused_with_the_nearest_name(
    raw: dict[str, Any], dotted: str, nearest: str
) -> None:
    assert f"{dotted}: unknown setting; did you mean `{nearest}`?" in refusal(raw).splitlines()


@pytest.mark.parametrize(
    ("part", "over", "expected"),
    [
        ("loss", {"rdd": {"weight": 1}}, "students.1.loss.rdd: unknown setting; did you mean `rrd`?"),
        ("loss", {"kd": {"wieght": 1}}, "students.1.loss.kd.wieght: unknown setting; did you mean `weight`?"),
        (
            "train",
            {"batchsize": 8},
            "students.1.train.batchsize: unknown setting; did you mean `batch_size`?",
        ),
        ("train", {"lr": -1}, "students.1.train.lr: Input should be greater than 0, got -1"),
    ],
)
def test_override_of_a_student_is_checked_like_the_run(
    part: str, over: dict[str, Any], expected: str
) -> None:
    raw = raw_config()
    raw["students"][1][part] = over
    assert expected in refusal(raw)


def test_name_like_nothing_known_gets_the_list_of_valid_names() -> None:
    message = refusal(raw_config(ray={"zzzzqqq": 1}))
    assert message == "ray.zzzzqqq: unknown setting; valid names here: address, num_cpus, object_store_bytes"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, got 0"),
        ("train.epochs=1.5", "train.epochs: Input should be a valid integer"),
        ("train.lr=.nan", "train.lr: "),
        ("train.lr=.inf", "train.lr: Input should be a finite number, got inf"),
        ("train.optimizer=lamb", "train.optimizer: Input should be 'sgd' or 'adamw', got 'lamb'"),
        ("loss.rrd.gate_strength=1.5", "loss.rrd.gate_strength: Input should be less than or equal to 1"),
        ("views.scale=[0.5]", "views.scale.1: this setting is required"),
        ("name=a b", "name: String should match pattern"),
        ("name=../up", "name: String should match pattern"),
        ("students=[]", "at least one student is required"),
        ("students=null", "at least one student is required"),
        ("data=null", "data: Input should be"),
        ("students.small.resources.num_gpus=-1", "students.0.resources.num_gpus: "),
    ],
)
def test_value_out_of_type_or_range_is_refused_by_its_dotted_name(
    tmp_path: Path, setting: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml(tmp_path, raw_config()), [setting])
    assert expected in caught.value.message


def test_all_problems_are_reported_at_once() -> None:
    lines = refusal(raw_config(train={"epochs": 0, "lr": 0}, data={})).splitlines()
    assert [line.split(":")[0] for line in lines] == ["data.dir", "train.epochs", "train.lr"]


def test_student_may_not_ask_for_logits_in_two_forms() -> None:
    both = {"kd": {"weight": 1.0}, "lrd": {"weight": 1.0}}
    assert "loss: kd and lrd ask for the teacher's logits in two forms" in refusal(raw_config(loss=both))
    raw = raw_config(loss={"kd": {"weight": 1.0}})
    raw["students"][0]["loss"] = {"lrd": {"weight": 0.5}}
    assert refusal(raw).startswith("students.0.loss: kd and lrd ask")
    raw["students"][0]["loss"]["kd"] = {"weight": 0}
    assert parse_config(raw).loss_of(parse_config(raw).students[0]).label() == "cross_entropy+lrd"


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"momentum": 0}, "nesterov needs momentum > 0; set nesterov to false"),
        ({"schedule": "step"}, "schedule `step` needs milestones"),
    ],
)
def test_training_settings_that_contradict_are_refused(train: dict[str, Any], expected: str) -> None:
    assert refusal(raw_config(train=train)).startswith(f"train: {expected}")
    raw = raw_config()
    raw["students"][1]["train"] = train
    assert refusal(raw).startswith(f"students.1.train: {expected}")
    raw["students"][1]["train"] = {**train, "nesterov": False, "milestones": [3]}
    parse_config(raw)


def test_students_have_different_names_and_none_is_called_like_the_teacher() -> None:
    twins = [{"name": "a", "model": "resnet8"}] * 2
    assert "a stands twice" in refusal(raw_config(students=twins))
    named = [{"name": "teacher", "model": "resnet8"}]
    assert "may not be called `teacher`" in refusal(raw_config(students=named, teacher={"weights": "w"}))
    assert parse_config(raw_config(students=named)).students[0].name == "teacher"


def test_student_settings_lie_over_those_of_the_run() -> None:
    raw = raw_config(
        seed=5, loss={"rrd": {"weight": 0.5, "gate": "by_count"}}, train={"lr": 0.2, "epochs": 7}
    )
    raw["students"][1] |= {"loss": {"rrd": {"weight": 2}}, "train": {"lr": 0.01}, "seed": 9}
    config = parse_config(raw)
    small, large = config.students
    assert config.loss_of(small) == config.loss
    assert config.train_of(small) == config.train
    assert (config.loss_of(large).rrd.weight, config.loss_of(large).rrd.gate) == (2, "by_count")
    assert (config.train_of(large).lr, config.train_of(large).epochs) == (0.01, 7)
    assert (config.seed_of(small), config.seed_of(large)) == (5, 9)


def test_merging_leaves_both_inputs_as_they_are() -> None:
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2, 3]}
    assert merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2, 3]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2, 3]})


def test_settings_are_laid_over_the_file_in_order(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, raw_config(train={"lr": 0.5}))
    config = load_config(
        path,
        [
            "train.lr=1e-3",
            "train.weight_decay=5e-4",
            "students.0.model=resnet32",
            "students.large.train.lr=2.5E-2",
            "teacher.weights=a=b.pt",
            "views.cycle=4",
            "views.cycle=null",
            "students.small.resources.custom={disk: 2}",
        ],
    )
    assert (config.train.lr, config.train.weight_decay) == (0.001, 0.0005)
    assert config.students[0].model == "resnet32"
    assert config.train_of(config.students[1]).lr == 0.025
    assert config.teacher is not None
    assert config.teacher.weights == "a=b.pt"
    assert config.views.cycle is None
    assert config.students[0].resources.as_ray() == {"CPU": 1.0, "disk": 2.0}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs", "expected a.b=value"),
        ("=3", "expected a.b=value"),
        ("students.tiny.model=x", "there is no element 'tiny'; there are: small, large"),
        ("students.2.model=x", "there is no element '2'; there are: small, large"),
        ("students.-1.model=x", "there is no element '-1'"),
        ("name.first=x", "the part before .first is not a mapping"),
        ("name.first.second=x", "the part before .first is not a mapping"),
        ("train={a: [1", "is not a YAML value"),
        ("train.lr=!!python/object/apply:os.getcwd []", "is not a YAML value"),
    ],
)
def test_setting_that_leads_nowhere_is_refused(setting: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_setting(raw_config(), setting)
    assert expected in caught.value.message


def test_new_key_of_a_setting_is_checked_against_the_schema(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lrr: unknown setting; did you mean `lr`"):
        load_config(write_yaml(tmp_path, raw_config()), ["train.lrr=1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold a mapping of settings, found list"),
        ("", "must hold a mapping of settings, found NoneType"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml(tmp_path, text))
    assert expected in caught.value.message
    assert "run.yaml" in caught.value.message


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml does not exist"):
        load_config(tmp_path / "no.yaml")


def test_python_objects_in_yaml_are_refused_and_not_made(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = f"name: !!python/object/apply:os.mkdir ['{trace}']"
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(write_yaml(tmp_path, text))
    with pytest.raises(ConfigError, match="is not a YAML value"):
        apply_setting(raw_config(), text.replace(": ", "=", 1))
    assert not trace.exists()
    yaml.unsafe_load(text)
    assert trace.exists(), "the text would have done harm"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.1e-2", "1.e-3", "+10e-4"])
def test_number_with_an_exponent_is_a_number(text: str) -> None:
    raw = raw_config()
    apply_setting(raw, f"loss.kd.weight={text}")
    assert raw["loss"]["kd"]["weight"] == pytest.approx(0.001)


def test_config_is_immutable() -> None:
    config = parse_config(raw_config())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_resources_of_nothing_are_left_out() -> None:
    assert Resources(num_cpus=0, num_gpus=0.5).as_ray() == {"GPU": 0.5}


def test_actor_is_pinned_by_resource_and_label_and_spread_if_asked() -> None:
    pinned = Resources(num_cpus=0, num_gpus=0.5, custom={"teacher": 0.01}, node_labels={"role": "teacher"})
    assert pinned.actor_options("SPREAD") == {
        "num_cpus": 0,
        "num_gpus": 0.5,
        "resources": {"teacher": 0.01},
        "label_selector": {"role": "teacher"},
        "scheduling_strategy": "SPREAD",
    }
    assert Resources().actor_options("STRICT_PACK")["scheduling_strategy"] == "DEFAULT"


@pytest.mark.parametrize("wanted", ["a", "!a", "in(a, b-1.c)", "!in(a,b)", "in(a)"])
def test_label_selector_of_ray_is_taken(wanted: str) -> None:
    assert validate_label_selector({"role": wanted}) is None
    assert Resources(node_labels={"role": wanted}).node_labels == {"role": wanted}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"node_labels": {"role": "not a"}}, r"node_labels\.role must be a value"),
        ({"node_labels": {"role": "in()"}}, r"got 'in\(\)'"),
        ({"num_gpus": 1.5}, "num_gpus above 1 must be a whole number, got 1.5"),
        ({"custom": {"GPU": 1}}, "custom names Ray's own GPU; use num_cpus and num_gpus"),
    ],
)
def test_resources_that_ray_would_refuse_later_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_config(raw_config(teacher={"weights": "w", "resources": changes}))


@pytest.mark.parametrize(
    ("wanted", "labels", "expected"),
    [
        ("a", {"role": "a"}, True),
        ("a", {}, False),
        ("!a", {"role": "b"}, True),
        ("!a", {}, True),
        ("!a", {"role": "a"}, False),
        ("in(a, b)", {"role": "b"}, True),
        ("in(a,b)", {"role": "c"}, False),
        ("!in(a, b)", {"role": "c"}, True),
    ],
)
def test_node_is_one_of_those_wanted(wanted: str, labels: dict[str, str], expected: bool) -> None:
    assert has_labels({"role": wanted}, labels) is expected


@given(
    lr=st.floats(1e-300, 1e300),
    milestones=st.lists(st.integers(-5, 10**12), max_size=3),
    seed=st.integers(-(2**70), 2**70),
    text=st.text(st.characters(codec="utf-8"), max_size=20),
    scale=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@example(lr=1e-3, milestones=[], seed=0, text="a\x85b: # 'c'", scale=(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_written_config_reads_back_equal(
    lr: float, milestones: list[int], seed: int, text: str, scale: tuple[float, float]
) -> None:
    raw = raw_config(
        train={"lr": lr, "milestones": milestones},
        seed=seed,
        run_dir=text,
        views={"scale": scale},
        teacher={"weights": text},
    )
    raw["students"][0]["train"] = {"lr": lr, "milestones": milestones}
    config = parse_config(raw)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_every_default_stands_in_the_written_config() -> None:
    written = yaml.safe_load(dump_config(parse_config(raw_config(teacher={"weights": "w"}))))
    assert set(written) == set(RunConfig.model_fields)
    assert written["train"]["momentum"] == 0.9
    assert written["teacher"]["micro_batch"] == 64


def test_presets_are_found() -> None:
    names = [path.name for path in PRESETS]
    assert {"teacher.yaml", "students.yaml", "cifar100_lt_teacher.yaml", "cifar100_lt.yaml"} <= set(names)
    assert len(names) >= 4


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_preset_parses_and_each_of_its_models_can_be_built(path: Path) -> None:
    config = load_config(path)
    side = config.views.side or config.data.image_size or (8 if path.parent.name == "demo" else 32)
    for student in config.students:
        info = describe_model(student.model, num_classes=100, image_size=side)
        assert info.num_params > 0
        assert config.loss_of(student).needs_teacher <= (config.teacher is not None)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_reading_a_config_needs_neither_torch_nor_ray() -> None:
    code = "import sys, krd_ray.config_io; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_workers_whose_own_teachers_would_repeat_each_other_are_refused() -> None:
    teacher = {"weights": "w", "placement": "in_process"}
    students = [{"name": "wide", "model": "m", "workers": 2}]
    with pytest.raises(ConfigError, match=r"in each of the 2 workers of students\.wide; set it to actors"):
        parse_config(raw_config(teacher=teacher, views={"cycle": 2}, students=students))
    parse_config(raw_config(teacher=teacher, students=students))
    parse_config(raw_config(teacher=teacher, views={"cycle": 2}))
