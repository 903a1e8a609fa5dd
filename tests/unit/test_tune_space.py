"""What a search space may say: files, metrics, names, conditions; and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from krd_ray.config import RunConfig
from krd_ray.config_io import load_config, parse_config
from krd_ray.errors import ConfigError
from krd_ray.tune.check import as_it_stands, probe_space
from krd_ray.tune.laying import lay, only_student, trial_student
from krd_ray.tune.space import Space, load_space
from tests.unit.run_builders import raw_run

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("tune_spaces/*.py"), *ROOT.glob("tune_spaces/*.yaml")])
CONFIG = ROOT / "configs/cifar100_lt_cpu.yaml"
LINES = 'METRIC = "val/few"\nMODE = "max"\n\n\ndef space(trial):\n    '


def config(**more: Any) -> RunConfig:
    return parse_config(raw_run(teacher={"weights": "teacher.safetensors"}, **more))


def space_of(tmp_path: Path, body: str, head: str = LINES) -> Space:
    path = tmp_path / "space.py"
    path.write_text(head + body + "\n")
    return load_space(path)


def probed(tmp_path: Path, body: str, **more: Any) -> Any:
    return probe_space(space_of(tmp_path, body), config(**more), seed=0)


def test_all_shipped_spaces_are_found() -> None:
    names = "loss_weights.py loss_weights.yaml rectification.py student_size.py tail_and_overall.py temperatures.py"
    assert sorted(path.name for path in SHIPPED) == names.split()
    assert all(path.name in (ROOT / "tune_spaces/README.md").read_text() for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_space_fits_the_shipped_config(path: Path) -> None:
    base = only_student(load_config(CONFIG), "resnet8")
    space = load_space(path)
    probe = probe_space(space, base, seed=0)
    assert space.baseline
    assert len(probe.names) >= 3
    assert probe.needs_teacher
    assert len(space.metrics) == (2 if path.stem == "tail_and_overall" else 1)


def test_conditional_branches_are_all_reached() -> None:
    probe = probe_space(load_space(ROOT / "tune_spaces/rectification.py"), config(), seed=0)
    assert {"loss.rrd.gate_strength", "loss.lrd.beta"} <= set(probe.names)
    priors = {student.loss["rrd"]["prior"] for student in probe.students if student.loss["rrd"]["weight"]}
    assert not priors, "no term is on in this config, and so no prior has to be found when the teacher starts"
    on = config(loss={"rrd": {"weight": 1.0}})
    probe = probe_space(load_space(ROOT / "tune_spaces/rectification.py"), on, seed=0)
    assert {student.loss["rrd"]["prior"] for student in probe.students} == {"auto", "sphere", "class_mean"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            'trial.suggest_float("loss.rrd.wieght", 0, 1)',
            "loss.rrd.wieght: unknown setting; did you mean `weight`?",
        ),
        ('trial.suggest_float("loss.rdr.weight", 0, 1)', "loss.rdr: unknown setting; did you mean `rrd`?"),
        (
            'trial.suggest_float("loss.lrd.temperature", -2.0, -1.0)',
            "loss.lrd.temperature: Input should be greater",
        ),
        ('trial.suggest_float("students.t.train.lr", 0.1, 1)', "there is no element 't'; there are: s"),
        (
            'trial.suggest_int("views.cycle", 1, 4)',
            "views.cycle cannot be searched: all trials share one teacher",
        ),
        (
            'trial.suggest_int("teacher.micro_batch", 1, 4)',
            "teacher.micro_batch cannot be searched: all trials share",
        ),
        ('trial.suggest_int("seed", 0, 9)', "seed cannot be searched: it is the seed of the views"),
        ('trial.suggest_int("data.shuffle_rows", 1, 4)', "all trials read the same shards"),
        ('trial.suggest_int("train.epochs", 1, 4)', "use `krd tune --epochs`"),
        ('trial.suggest_int("students.s.workers", 1, 4)', "all trials reserve the same"),
        ('trial.suggest_int("students.s.resources.num_cpus", 1, 4)', "all trials reserve the same"),
        (
            'trial.suggest_categorical("evaluate", [True])',
            "evaluate cannot be searched; a space may set loss.*",
        ),
        ("pass", "the space is empty"),
        ("trial.suggest_flaot('a', 0, 1)", "space() raised AttributeError"),
        ("return 3", "space() returned int"),
    ],
)
def test_space_is_refused_with_the_reason(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        probed(tmp_path, body)
    assert message in error.value.message
    assert str(tmp_path / "space.py") in error.value.message


def test_error_in_a_space_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: division by zero \(line 7\)"):
        probed(tmp_path, "trial.suggest_float('loss.rrd.weight', 0, 1)\n    1 / 0")
    with pytest.raises(ConfigError, match=r"SyntaxError: .* \(line 6\)"):
        space_of(tmp_path, "if")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            'METRIC = "test/few"\nMODE = "max"',
            "never selects on the test split, which is read once, at the end; did you",
        ),
        ('METRIC = "val/fwe"\nMODE = "max"', "is no metric of a validation row; did you mean 'val/few'?"),
        ('METRIC = "few"\nMODE = "max"', "did you mean 'val/few'?"),
        ('MODE = "max"', "METRIC must name one or two metrics"),
        ('METRIC = ["val/few", "val/top1", "val/many"]\nMODE = "max"', "METRIC must name one or two metrics"),
        ('METRIC = ["val/few", "val/few"]\nMODE = ["max", "max"]', "METRIC names val/few twice"),
        ('METRIC = "val/few"', "MODE is missing; for METRIC val/few it must be 'max'"),
        ('METRIC = "val/few"\nMODE = "min"', "MODE is 'min'; for METRIC val/few it must be 'max'"),
        ('METRIC = "val/few"\nMODE = "max"\nBASELINE = 1', "BASELINE must be True or False"),
        (
            'METRIC = "val/few"\nMODE = "max"\nBASLINE = False',
            "BASLINE means nothing here; did you mean BASELINE?",
        ),
    ],
)
def test_metric_and_mode_are_checked(tmp_path: Path, head: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(
            tmp_path, "trial.suggest_float('loss.rrd.weight', 0, 1)", f"{head}\n\n\ndef space(trial):\n    "
        )
    assert message in error.value.message


def test_file_must_exist_and_have_a_known_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_space(tmp_path / "none.py")
    (tmp_path / "space.txt").write_text("")
    with pytest.raises(ConfigError, match=r"expected a \.py or a \.yaml file"):
        load_space(tmp_path / "space.txt")
    (tmp_path / "other.py").write_text('METRIC = "val/few"\nMODE = "max"\n')
    with pytest.raises(ConfigError, match=r"has no function space\(trial\)"):
        load_space(tmp_path / "other.py")


def declared(tmp_path: Path, **parameters: Any) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(
        yaml.safe_dump({"metric": "val/few", "mode": "max", "parameters": parameters}, sort_keys=False)
    )
    return load_space(path)


def test_declared_space_draws_what_its_conditions_allow(tmp_path: Path) -> None:
    space = declared(
        tmp_path,
        **{
            "loss.classification.name": {"type": "choice", "choices": ["cross_entropy", "focal"]},
            "loss.classification.gamma": {
                "type": "float",
                "low": 1,
                "high": 3,
                "when": {"loss.classification.name": "focal"},
            },
            "train.batch_size": {"type": "int", "low": 8, "high": 64, "log": True},
        },
    )
    probe = probe_space(space, config(), seed=0)
    assert set(probe.names) == {"loss.classification.name", "loss.classification.gamma", "train.batch_size"}
    gammas = {
        student.loss["classification"]["gamma"]
        for student in probe.students
        if student.loss["classification"]["name"] == "cross_entropy"
    }
    assert gammas <= {2.0}, "drawn for focal only"


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"type": "float", "low": 1}, "type float needs low and high"),
        ({"type": "choice"}, "type choice needs choices"),
        ({"type": "float", "low": 1, "hihg": 2}, "unknown setting; did you mean `high`?"),
        (
            {"type": "float", "low": 0, "high": 1, "when": {"loss.x": 1}},
            "loss.x is not a parameter listed above it",
        ),
    ],
)
def test_declared_space_is_checked(tmp_path: Path, parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        declared(tmp_path, **{"loss.rrd.weight": parameter})
    assert message in error.value.message


def test_settings_are_laid_by_the_configs_own_language_and_survive_yaml(tmp_path: Path) -> None:
    base = config(loss={"rrd": {"weight": 1.0}}, train={"lr": 0.1})
    laid = lay(base, {"loss.rrd.weight": 1e-5, "students.s.model": "digits_net_8", "train.nesterov": False})
    assert laid.loss.rrd.weight == 1e-5
    assert laid.students[0].model == "digits_net_8"
    assert laid.train.nesterov is False
    assert base.loss.rrd.weight == 1.0
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump(laid.model_dump(mode="json")))
    assert load_config(path) == laid


def test_setting_that_the_student_overrides_is_refused_for_it_would_change_nothing() -> None:
    own = {"name": "s", "model": "digits_net_4", "loss": {"rrd": {"weight": 3}}}
    base = config(students=[own])
    with pytest.raises(ConfigError, match=r"search\s+students\.s\.loss\.rrd\.weight"):
        lay(base, {"loss.rrd.weight": 1.0})
    laid = lay(base, {"students.s.loss.rrd.weight": 1.0})
    assert laid.loss_of(laid.students[0]).rrd.weight == 1.0
    assert trial_student(base, {"loss.lrd.weight": 2.0}, "7").loss["lrd"]["weight"] == 2.0


def test_search_wants_one_student() -> None:
    two = config(students=[{"name": name, "model": "digits_net_4"} for name in ("a", "b")])
    with pytest.raises(ConfigError, match="choose one with --student a"):
        only_student(two, None)
    with pytest.raises(ConfigError, match="it has a, b"):
        only_student(two, "c")
    assert [student.name for student in only_student(two, "b").students] == ["b"]


def test_baseline_is_the_config_even_where_the_space_would_never_draw_it(tmp_path: Path) -> None:
    body = (
        'trial.suggest_float("loss.rrd.weight", 0.1, 10.0, log=True)\n'
        '    trial.suggest_float("loss.lrd.tau_prior", 0.0, 2.0)\n'
        '    if trial.suggest_categorical("loss.rrd.target", ["teacher", "mix"]) == "mix":\n'
        '        trial.suggest_float("loss.rrd.gate_strength", 0, 1)'
    )
    found = as_it_stands(space_of(tmp_path, body), config())
    assert found == {"loss.lrd.tau_prior": 1.5, "loss.rrd.target": "teacher"}, (
        "a weight of 0 is below the range"
    )


@pytest.mark.parametrize("name", ["bound", "gain"])
def test_configs_of_the_search_benchmark_can_be_searched(name: str) -> None:
    base = load_config(ROOT / f"benchmarks/search/configs/{name}.yaml")
    probe = probe_space(load_space(ROOT / "tune_spaces/loss_weights.py"), only_student(base, None), seed=0)
    assert probe.needs_teacher
    assert base.views.cycle is not None, "so that forwards are views times images"
