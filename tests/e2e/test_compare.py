"""Methods x seeds in one job with one teacher, in waves, and the table that `krd compare` makes of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import krd, rows_of

pytestmark = pytest.mark.timeout(600)

METHODS: dict[str, Any] = {
    "krd": {},
    "rivals": {
        "loss": {
            "classification": {"name": "ldam", "reweight_from_epoch": 1},
            "lrd": {"weight": 0},
            "rrd": {"weight": 0},
            **{name: {"weight": 0.1} for name in ("kd", "dkd", "bkd", "ltkd", "dive", "cckd", "nd", "pld")},
        },
        "train": {"sampler": {"name": "class_balanced", "from_epoch": 1}},
    },
}


def test_methods_times_seeds_in_one_job_cost_one_teacher_and_end_in_a_table(
    distill_config: Callable[..., Path], tmp_path: Path
) -> None:
    compare = {
        "methods": METHODS,
        "models": [{"model": "digits_net_4", "resources": {"num_cpus": 0.25}}],
        "seeds": [0, 1],
    }
    config = distill_config([], compare=compare, students_at_once=2, evaluate=True, train={"epochs": 3})
    done = krd("distill", config)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    names = [student["name"] for student in yaml.safe_load((run / "config.yaml").read_text())["students"]]
    assert names == [f"{method}.digits_net_4.s{seed}" for seed in (0, 1) for method in METHODS]

    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["forwards_per_unique_view"] == 1.0
    num_train = json.loads((run / "dataset.json").read_text())["splits"]["train"]["num_rows"]
    assert ledger["teacher"]["unique_views"] > 3 * num_train, (
        "copies of rare samples take views of later epochs"
    )
    for name in names:
        coverage = rows_of(run, name, "coverage")
        assert [(row["missed"], row["doubled"]) for row in coverage] == [(0, 0)] * 3
    plain, repeated = (rows_of(run, f"{method}.digits_net_4.s0", "coverage") for method in METHODS)
    assert [row["seen"] for row in plain] == [num_train] * 3
    assert repeated[0]["seen"] == num_train > repeated[1]["seen"], (
        "head samples are left out, tail samples repeated"
    )
    starts = {name: rows_of(run, name, "start")[0]["time"] for name in names}
    ends = {name: rows_of(run, name, "coverage")[-1]["time"] for name in names}
    assert min(starts[name] for name in names[2:]) > min(ends[name] for name in names[:2]), "two at once"

    out = tmp_path / "table"
    done = krd("compare", run, "--out", out, "--against", "krd")
    assert done.returncode == 0, done.stdout + done.stderr
    with (out / "comparison.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(METHODS) <= set(rows)
    with (out / "students.csv").open() as file:
        own = [float(row["top1"]) for row in csv.DictReader(file) if row["method"] == "krd"]
    assert float(rows["krd"]["top1_mean"]) == pytest.approx(sum(own) / 2)
    assert list(out.glob("*.png"))
