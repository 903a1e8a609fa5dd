"""Answers whether a comparison says what the runs hold: means, spreads, pairs, gaps, what may be called best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.errors import ConfigError, RunError
from krd_ray.report.comparison import METRICS, clear_best, compare_runs, imbalance_rows
from krd_ray.report.seeds import mean_and_std
from krd_ray.report.tables import Row
from tests.unit.report_runs import read_json, write_json, write_run

METHODS = {"ce": "cross_entropy", "krd": "balanced_softmax+rrd+lrd"}
FAILED = "krd.resnet8.s1"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two models, three seeds; one student failed."""
    return write_run(tmp_path_factory.mktemp("runs") / "first", methods=METHODS, failed=FAILED)


@pytest.fixture
def own_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(run_dir, tmp_path / "first"))


def cell_of(cells: list[Row], method: str | None, model: str, dataset: str | None = None) -> Row:
    [found] = [
        cell
        for cell in cells
        if (cell["method"], cell["model"]) == (method, model) and dataset in (None, cell["dataset"])
    ]
    return found


def change_config(folder: Path, **over: Any) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **over}))


def test_means_and_sample_deviations_are_those_of_the_evaluation(run_dir: Path) -> None:
    models = read_json(run_dir / "evaluation.json")["models"]
    cells = compare_runs([run_dir]).cells
    assert len(cells) == 1 + len(METHODS) * 2
    for method in METHODS:
        for model in ("resnet8", "resnet20"):
            names = [f"{method}.{model}.s{seed}" for seed in range(3)]
            metrics = [models[name]["metrics"] for name in names if name != FAILED]
            cell = cell_of(cells, method, model)
            assert (cell["num_seeds"], cell["num_students"]) == (len(metrics), 3)
            for key in METRICS:
                values = np.array([each[key] for each in metrics])
                assert cell[key] == pytest.approx(values.sum() / len(values), rel=1e-12)
                assert cell[f"{key}_std"] == pytest.approx(
                    np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)), rel=1e-9
                )


def test_teacher_has_its_own_row_first_without_spread(run_dir: Path) -> None:
    teacher = compare_runs([run_dir]).cells[0]
    expected = read_json(run_dir / "evaluation.json")["models"]["teacher"]["metrics"]
    assert (teacher["role"], teacher["model"], teacher["num_seeds"]) == ("teacher", "resnet110", None)
    assert {key: teacher[key] for key in METRICS} == {key: expected[key] for key in METRICS}
    assert all(teacher[f"{key}_std"] is None for key in METRICS)


def test_rows_go_by_size_of_the_model_then_as_the_settings_name_the_methods(run_dir: Path) -> None:
    found = [(cell["model"], cell["method"]) for cell in compare_runs([run_dir]).cells[1:]]
    assert found == [("resnet8", "ce"), ("resnet8", "krd"), ("resnet20", "ce"), ("resnet20", "krd")]


def test_student_that_failed_or_was_not_evaluated_is_named_not_dropped(own_run: Path) -> None:
    evaluation = read_json(own_run / "evaluation.json")
    del evaluation["models"]["ce.resnet8.s2"]
    write_json(own_run / "evaluation.json", evaluation)
    comparison = compare_runs([own_run])
    states = {(cell["method"], cell["model"]): cell["state"] for cell in comparison.cells}
    assert states["krd", "resnet8"] == "1 of 3 failed"
    assert states["ce", "resnet8"] == "1 of 3 not evaluated"
    assert states["krd", "resnet20"] == states[None, "resnet110"] == ""
    rows = {row["name"]: row for row in comparison.students}
    assert len(rows) == 12
    assert (rows[FAILED]["status"], rows[FAILED]["evaluated"], rows[FAILED]["top1"]) == (
        "failed",
        False,
        None,
    )
    assert (rows["ce.resnet8.s2"]["status"], rows["ce.resnet8.s2"]["evaluated"]) == ("finished", False)
    assert cell_of(comparison.cells, "ce", "resnet8")["num_seeds"] == 2


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", methods=METHODS, seeds=(5,))
    cells = compare_runs([run_dir]).cells
    assert [cell["num_seeds"] for cell in cells] == [None, 1, 1, 1, 1]
    assert [cell["seeds"] for cell in cells[1:]] == ["5"] * 4
    assert all(cell[f"{key}_std"] is None for cell in cells for key in METRICS)
    assert clear_best(cells) == {}


def test_group_without_classes_has_no_value(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", methods=METHODS, ratio=10)
    for cell in compare_runs([run_dir]).cells:
        assert cell["few"] is cell["few_std"] is None
        assert cell["many"] is not None
        assert (cell["dataset"], cell["imbalance_ratio"]) == ("demo, imbalance 10", 10.0)


def test_metric_that_one_seed_does_not_know_has_no_mean(own_run: Path) -> None:
    evaluation = read_json(own_run / "evaluation.json")
    evaluation["models"]["ce.resnet8.s2"]["metrics"]["ece"] = float("nan")
    write_json(own_run / "evaluation.json", evaluation)
    cell = cell_of(compare_runs([own_run]).cells, "ce", "resnet8")
    assert (cell["ece"], cell["ece_std"], cell["num_seeds"]) == (None, None, 3)
    assert cell["top1_std"] is not None


def test_val_split_takes_the_last_val_row_of_students_that_finished(own_run: Path) -> None:
    metrics = own_run / "students" / "ce.resnet20.s0" / "metrics.jsonl"
    again = {
        "split": "val",
        "epoch": 2,
        "attempt": 1,
        "top1": 0.75,
        "balanced": 0.5,
        "many": 0.875,
        "few": 0.25,
    }
    metrics.write_text(metrics.read_text() + json.dumps(again) + "\n")
    comparison = compare_runs([own_run], split="val")
    rows = {row["name"]: row for row in comparison.students}
    assert [rows["ce.resnet20.s0"][key] for key in ("top1", "balanced", "few")] == [0.75, 0.5, 0.25]
    assert (rows[FAILED]["evaluated"], rows[FAILED]["top1"]) == (False, None)
    last = [
        [row for row in map(json.loads, path.read_text().splitlines()) if row["split"] == "val"][-1][
            "balanced"
        ]
        for path in (own_run / "students" / f"ce.resnet20.s{seed}" / "metrics.jsonl" for seed in range(3))
    ]
    cell = cell_of(comparison.cells, "ce", "resnet20")
    assert cell["balanced"] == pytest.approx(np.mean(last), rel=1e-12)
    assert cell["balanced_std"] == pytest.approx(np.std(last, ddof=1), rel=1e-9)
    assert comparison.cells[0]["top1"] is None


def test_differences_are_paired_by_seed(run_dir: Path) -> None:
    models = read_json(run_dir / "evaluation.json")["models"]
    cells = compare_runs([run_dir], against="ce").cells
    for model in ("resnet8", "resnet20"):
        cell = cell_of(cells, "krd", model)
        seeds = [seed for seed in range(3) if f"krd.{model}.s{seed}" != FAILED]
        assert cell["num_pairs"] == len(seeds)
        for key in ("top1", "few"):
            gains = np.array(
                [
                    models[f"krd.{model}.s{seed}"]["metrics"][key]
                    - models[f"ce.{model}.s{seed}"]["metrics"][key]
                    for seed in seeds
                ]
            )
            assert cell[f"{key}_diff"] == pytest.approx(gains.mean(), rel=1e-9)
            assert cell[f"{key}_diff_std"] == pytest.approx(gains.std(ddof=1), rel=1e-9)
        own = cell_of(cells, "ce", model)
        assert own["num_pairs"] is own["top1_diff"] is own["few_diff_std"] is None
    assert cells[0]["num_pairs"] is None


def test_unknown_method_to_compare_against_is_refused_with_its_nearest(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"--against krt: no such method; did you mean krd\? .* ce, krd"):
        compare_runs([run_dir], against="krt")


def test_folder_given_twice_or_no_run_directory_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is given twice"):
        compare_runs([run_dir, run_dir / ".." / run_dir.name])
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        compare_runs([run_dir, tmp_path])


def test_run_without_evaluated_students_is_named_with_what_to_do(run_dir: Path, tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", methods=METHODS, evaluated=False, val=False)
    with pytest.raises(
        RunError, match=r"bare: no student is evaluated on the test split; `krd evaluate .*bare`"
    ):
        compare_runs([run_dir, bare])
    with pytest.raises(RunError, match="no student is evaluated on the val split; that needs a val split"):
        compare_runs([bare], split="val")


def only_seeds(run_dir: Path, seeds: tuple[int, ...]) -> None:
    """Takes the students of other seeds out of a run directory."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    gone = [entry["name"] for entry in config["students"] if entry["seed"] not in seeds]
    evaluation, ledger = read_json(run_dir / "evaluation.json"), read_json(run_dir / "ledger.json")
    for name in gone:
        shutil.rmtree(run_dir / "students" / name)
        evaluation["models"].pop(name, None)
        del ledger["students"][name]
    write_json(run_dir / "evaluation.json", evaluation)
    write_json(run_dir / "ledger.json", ledger)
    change_config(run_dir, students=[entry for entry in config["students"] if entry["name"] not in gone])


def test_seeds_in_two_runs_of_the_same_settings_are_one_comparison(run_dir: Path, tmp_path: Path) -> None:
    halves = [Path(shutil.copytree(run_dir, tmp_path / name)) for name in ("a", "b")]
    only_seeds(halves[0], (0, 2))
    only_seeds(halves[1], (1,))
    change_config(halves[1], name="another", seed=7, run_dir="elsewhere", students_at_once=3)
    together, whole = compare_runs(halves, against="ce"), compare_runs([run_dir], against="ce")
    assert len(together.cells) == len(whole.cells)
    for mine, theirs in zip(together.cells, whole.cells, strict=True):
        for key in theirs:
            if key != "seeds":
                exact = not isinstance(theirs[key], float)
                assert mine[key] == (theirs[key] if exact else pytest.approx(theirs[key], rel=1e-9)), key


@pytest.mark.parametrize("change", ["settings", "seeds", "students", "data"])
def test_runs_that_differ_are_not_averaged(run_dir: Path, tmp_path: Path, change: str) -> None:
    first, second = (Path(shutil.copytree(run_dir, tmp_path / name)) for name in ("a", "b"))
    if change != "seeds":
        only_seeds(first, (0, 2))
        only_seeds(second, (1,))
    if change == "settings":
        change_config(second, train={"epochs": 3, "lr": 0.2})
    if change == "students":
        entries = yaml.safe_load((second / "config.yaml").read_text())["students"]
        change_config(second, students=[{**entry, "train": {"lr": 0.3}} for entry in entries])
    if change == "data":
        write_json(
            second / "dataset.json", {**read_json(second / "dataset.json"), "content_hash": "of other images"}
        )
    comparison = compare_runs([first, second])
    assert {cell["dataset"] for cell in comparison.cells} == {
        "demo, imbalance 100 (a)",
        "demo, imbalance 100 (b)",
    }
    assert imbalance_rows(comparison) == []


def test_students_of_one_label_with_other_settings_or_the_same_seed_stand_apart(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    change_config(
        run_dir,
        students=[
            {
                "name": "krd-resnet8",
                "model": "resnet8",
                "method": "mine",
                "loss": {"rrd": {"weight": 1}},
                "seed": 0,
            },
            {
                "name": "ce-resnet8",
                "model": "resnet8",
                "method": "mine",
                "loss": {"rrd": {"weight": 2}},
                "seed": 1,
            },
        ],
    )
    found = [cell["method"] for cell in compare_runs([run_dir]).cells if cell["role"] == "student"]
    assert found == ["mine (krd-resnet8)", "mine (ce-resnet8)"]


def test_ratios_are_compared_where_one_data_set_has_several(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(ratio), methods=METHODS, models=("resnet8",), ratio=ratio)
        for ratio in (100, 10)
    ]
    comparison = compare_runs(runs)
    assert list(dict.fromkeys(cell["imbalance_ratio"] for cell in comparison.cells)) == [10.0, 100.0]
    assert imbalance_rows(comparison) == comparison.cells
    assert imbalance_rows(compare_runs(runs[:1])) == []


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_mean_and_deviation_agree_with_numpy(values: list[float]) -> None:
    mean, std = mean_and_std(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    if len(values) == 1:
        assert std is None
    else:
        assert std == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def made_up_cells(figures: list[tuple[float, float]]) -> list[Row]:
    blank = {key + end: None for key in METRICS for end in ("", "_std")}
    return [
        {**blank, "role": "student", "dataset": "d", "model": "m", "method": index}
        | {"few": mean, "few_std": std, "ece": -mean, "ece_std": std}
        for index, (mean, std) in enumerate(figures)
    ]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.3)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_is_called_best_leads_every_other_by_more_than_both_spreads(
    figures: list[tuple[float, float]],
) -> None:
    cells = made_up_cells(figures)
    best = clear_best(cells)
    leaders = [
        index
        for index, (mean, std) in enumerate(figures)
        if len(figures) > 1
        and all(
            mean - other > max(std, spread) for place, (other, spread) in enumerate(figures) if place != index
        )
    ]
    for key in ("few", "ece"):
        found = [best["d", "m", key]["method"]] if ("d", "m", key) in best else []
        assert found == leaders
    assert ("d", "m", "agreement") not in best


def test_nothing_is_best_where_one_spread_is_not_known() -> None:
    cells = made_up_cells([(0.2, 0.01), (0.8, 0.01)])
    assert clear_best(cells)
    cells[0]["few_std"] = cells[0]["ece_std"] = None
    assert clear_best(cells) == {}
