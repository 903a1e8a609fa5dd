"""Whole runs with the teacher inside the student, shared, and off: what each costs, and that all teach the same."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import ENVIRONMENT, TIMEOUT_S, rows_of

pytestmark = pytest.mark.timeout(600)
EPOCHS, CYCLE = 3, 2

# One process and one cluster for all runs, in this order.
RUNS = """
    import sys
    from pathlib import Path
    from krd_ray.cli import app
    from krd_ray.config import RayConfig
    from krd_ray.config_io import load_config
    from krd_ray.errors import ResourceError, TeacherError
    from krd_ray.train.cluster import connected
    from krd_ray.train.run import start_run

    configs = Path(sys.argv[1])

    def finish(name):
        assert not start_run(load_config(configs / f"{name}.yaml", ())).failed, name

    def fill(*words):
        app(["targets", str(configs / "stored.yaml"), *words], standalone_mode=False)

    with connected(RayConfig(num_cpus=2, object_store_bytes=128 << 20)):
        try:
            finish("stored")
        except TeacherError as error:
            print(f"refused: {error.message}")
        try:
            fill("--set", "teacher.disk_bytes=100000")
        except ResourceError as error:
            print(f"too small: {error.message}")
        finish("inside")
        finish("together")
        finish("shared")
        for _ in range(2):
            fill()
        finish("stored")
"""


@dataclass(frozen=True)
class Runs:
    """The run directories by name, and what was printed."""

    root: Path
    printed: str

    def ledger(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.root / name / "ledger.json").read_text())
        return content

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in rows_of(self.root / name, "only", "train")]

    @property
    def num_train(self) -> int:
        dataset = json.loads((self.root / "shared/dataset.json").read_text())
        num_rows: int = dataset["splits"]["train"]["num_rows"]
        return num_rows


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("placements")
    store = {"persist": True, "spill_dir": str(root / "store"), "replicas": 2}
    chosen = {
        "inside": (1, None, {"placement": "in_process"}),
        "together": (1, None, {"placement": "in_process"}),
        "shared": (EPOCHS, CYCLE, {}),
        "stored": (EPOCHS, CYCLE, {"placement": "stored", **store}),
    }
    for name, (epochs, cycle, teacher) in chosen.items():
        config = {
            **base,
            "name": name,
            "run_dir": str(root / name),
            "views": {**base["views"], "cycle": cycle},
            "train": {**base["train"], "epochs": epochs, "checkpoint_every_epochs": epochs},
            "teacher": {"weights": str(teacher_weights), "resources": {"num_cpus": 0.25}, **teacher},
            "loss": {"rrd": {"weight": 1}, "lrd": {"weight": 1}},
            "students": [{"name": "only", "model": "digits_net_4", "resources": {"num_cpus": 0.25}}],
        }
        if name == "together":
            wide = {**config["students"][0], "name": "wide", "model": "digits_net_8"}
            config |= {"students": [*config["students"], wide], "students_per_process": 2}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNS), str(root)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Runs(root, done.stdout)


def test_a_teacher_inside_its_only_student_forwards_each_view_once_and_gains_nothing(runs: Runs) -> None:
    ledger = runs.ledger("inside")
    assert ledger["forwards_per_unique_view"] == 1.0
    teacher, student = ledger["teacher"], ledger["students"]["only"]
    assert teacher["forwards"] == student["samples"] == runs.num_train
    assert teacher["process_cpu_s"] == 0, "the student's process has paid for it"
    assert 0 < teacher["cpu_s"] < student["cpu_s"]
    assert ledger["A_star"] == pytest.approx(1.0)
    assert 0.6 < ledger["A"] <= 1.0
    assert len(runs.losses("inside")) == 1


def test_a_teacher_inside_a_process_of_two_students_forwards_for_both_and_gains(runs: Runs) -> None:
    ledger = runs.ledger("together")
    teacher, students = ledger["teacher"], ledger["students"]
    assert ledger["forwards_per_unique_view"] == 1.0
    assert teacher["forwards"] == runs.num_train == students["only"]["samples"] == students["wide"]["samples"]
    assert teacher["process_cpu_s"] == 0, "the students' process has paid for it, and each bears a half"
    assert students["only"]["teacher_cpu_s"] == students["wide"]["teacher_cpu_s"] == teacher["cpu_s"] / 2
    for student in students.values():
        assert student["cpu_s"] > student["step_cpu_s"] + student["teacher_cpu_s"]
    assert 1.0 < ledger["A"] <= ledger["A_star"]
    assert runs.losses("together") == runs.losses("inside"), "whoever trains beside it changes nothing"


def test_training_from_a_filled_store_needs_no_forward_and_equals_the_run_with_actors_to_the_bit(
    runs: Runs,
) -> None:
    ledger, shared = runs.ledger("stored"), runs.ledger("shared")
    assert ledger["teacher"]["forwards"] == ledger["teacher"]["calibration_forwards"] == 0
    assert not list((runs.root / "stored/teacher").glob("stats-*"))
    assert ledger["students"]["only"]["requests"] > 0
    assert shared["teacher"]["forwards"] == CYCLE * runs.num_train
    assert len(runs.losses("stored")) == EPOCHS
    assert runs.losses("stored") == runs.losses("shared")
    for name in ("stored", "shared"):
        assert runs.ledger(name)["driver_bytes"] == {"pixels": 0, "targets": 0}


def test_a_store_is_refused_before_it_is_filled_and_filled_once(runs: Runs) -> None:
    lines = runs.printed.splitlines()
    (refused,) = (line for line in lines if line.startswith("refused: "))
    assert "holds no targets of this teacher for these images; fill it with `krd targets CONFIG`" in refused
    (too_small,) = (line for line in lines if line.startswith("too small: "))
    assert "teacher.disk_bytes is 100,000: raise it, or lower views.cycle" in too_small
    filled = [line for line in lines if "computed in" in line]
    all_rows = CYCLE * runs.num_train
    assert [line.startswith(f"{all_rows:,} targets of {CYCLE} view(s) in ") for line in filled] == [True] * 2
    assert [line.split("; ")[-1].split(" in ")[0] for line in filled] == [
        f"{all_rows:,} computed",
        "0 computed",
    ]
