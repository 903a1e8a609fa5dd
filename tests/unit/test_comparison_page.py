"""Answers whether a comparison is written and printed as it was computed: files, tables, pages, terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from krd_ray.cli import app
from krd_ray.report.comparison import METRICS, clear_best, compare_runs
from krd_ray.report.comparison_page import write_comparison
from krd_ray.report.comparison_text import as_markdown, latency_note, notes
from krd_ray.report.page import build_report
from krd_ray.report.read_run import read_run
from krd_ray.report.sections import FIGURES
from krd_ray.report.terminal import print_headline
from tests.unit.report_runs import read_csv, read_json, write_json, write_run

METHODS = {"ce": "cross_entropy", "bsm": "balanced_softmax", "krd": "balanced_softmax+rrd+lrd"}
FAILED = "krd.resnet8.s1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three methods, one model, three seeds, at two imbalance ratios; one student failed."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(
            folder / f"r{ratio}",
            methods=METHODS,
            models=("resnet8", "resnet20") if ratio == 100 else ("resnet8",),
            ratio=ratio,
            seed=ratio,
            failed=FAILED if ratio == 100 else None,
        )
        for ratio in (10, 100)
    ]


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "comparison"
    files = write_comparison(compare_runs(runs, against="ce"), out)
    assert sorted(out.iterdir()) == sorted(files)
    return out


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Path:
    """The report of the run with two models."""
    return build_report(runs[1]).parent


def test_csv_holds_every_cell_to_the_last_digit_and_nothing_for_what_is_not_known(
    runs: list[Path], written: Path
) -> None:
    cells = compare_runs(runs, against="ce").cells
    rows = read_csv(written / "comparison.csv")
    assert len(rows) == len(cells) == 4 + 7
    for row, cell in zip(rows, cells, strict=True):
        assert row["dataset"] == cell["dataset"]
        assert row["method"] == (cell["method"] or "teacher")
        for key in (*METRICS, "top1_diff", "few_diff"):
            for name, value in ((f"{key}_mean", cell[key]), (f"{key}_std", cell[f"{key}_std"])):
                assert (float(row[name]) if row[name] else None) == value


def test_students_csv_has_a_row_for_every_student(runs: list[Path], written: Path) -> None:
    rows = {(row["run"], row["name"]): row for row in read_csv(written / "students.csv")}
    assert len(rows) == 9 + 18
    for run_dir in runs:
        for name, entry in read_json(run_dir / "evaluation.json")["models"].items():
            if entry["role"] == "student":
                assert float(rows[run_dir.name, name]["top1"]) == entry["metrics"]["top1"]
    failed = rows[runs[1].name, FAILED]
    assert (failed["status"], failed["top1"], failed["seed"]) == ("failed", "", "1")


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of the first table of a Markdown text, its line of dashes left out."""
    lines = text.split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_markdown_table_shows_mean_and_spread_and_dashes(runs: list[Path], written: Path) -> None:
    comparison = compare_runs(runs, against="ce")
    heads, *rows = markdown_rows((written / "comparison.md").read_text())
    assert heads[:4] == ["data", "model", "method", "seeds"]
    assert len(rows) == len(comparison.cells)
    best = clear_best(comparison.cells)
    assert best
    for row, cell in zip(rows, comparison.cells, strict=True):
        shown = dict(zip(heads, row, strict=True))
        assert shown["method"] == (cell["method"] or "teacher")
        for heading, key in {"top-1": "top1", "few": "few"}.items():
            mean, std = cell[key], cell[f"{key}_std"]
            text = (
                "-" if mean is None else f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
            )
            leads = best.get((cell["dataset"], cell["model"], key)) is cell
            assert shown[heading] == (f"**{text}**" if leads else text)
    assert [row[heads.index("state")] for row in rows].count("1 of 3 failed") == 1
    assert sum(row[heads.index("few")] == "-" for row in rows) == 4  # imbalance 10 has no few-shot class


def test_markdown_says_split_seeds_pairs_and_latency(written: Path) -> None:
    text = (written / "comparison.md").read_text()
    assert "on the test split" in text
    assert "mean ± standard deviation over 2 to 3 seeds (0, 1, 2)" in text
    assert "Method minus ce with the same seed and model" in text
    assert "Abacus 5, torch 2.8.0, batch 1, 1 thread" in text
    assert "| resnet8 | 80,000 | 12M | 1.2 |" in text


def test_underscores_and_bars_of_names_do_not_break_the_markdown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", methods={"a_b": "cross_entropy"}, models=("resnet8",))
    dataset = read_json(run_dir / "dataset.json")
    write_json(run_dir / "dataset.json", {**dataset, "name": "x|y"})
    other = write_run(tmp_path / "other", methods={"a_b": "cross_entropy"}, models=("resnet8",), ratio=10)
    text = as_markdown(compare_runs([run_dir, other]))
    assert r"| x\|y, imbalance 100 | a\_b | 3 |" in text


def test_page_stands_alone_and_its_links_lead_somewhere(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(list(written.glob("*.png"))) == 1 + 2 * 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    for link in re.findall(r'href="([^"]*)"', page):
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in page
        elif link != "data:,":
            assert (written / link).is_file()
    assert "loss is &lt;NaN&gt;" in page
    assert "<NaN>" not in page


def test_writing_again_gives_the_same_bytes_and_takes_old_pictures_away(
    runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_comparison(compare_runs(runs[:1]), out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "accuracy_by_group_of_old.png").write_bytes(b"")
    write_comparison(compare_runs(runs[:1]), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert not any("imbalance_demo" in name for name in first)


def test_verb_writes_prints_and_names_the_files(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(out), "--against", "ce"])
    assert done.exit_code == 0, done.output
    for path in out.iterdir():
        assert f"wrote {path}" in done.output
    cells = [cell for cell in compare_runs(runs).cells if cell["role"] == "student"]
    for cell in cells:
        value = f"{100 * cell['top1']:.1f} ± {100 * cell['top1_std']:.1f}"
        assert any(cell["method"] in line and value in line for line in done.output.splitlines())


def test_verb_refuses_another_split(runs: list[Path]) -> None:
    done = CliRunner().invoke(app, ["compare", str(runs[0]), "--split", "train"])
    assert done.exit_code == 1
    assert "--split is test or val, got train" in str(done.exception)


def test_val_comparison_is_written_without_a_figure_of_the_teacher(runs: list[Path], tmp_path: Path) -> None:
    write_comparison(compare_runs(runs, split="val"), tmp_path)
    heads, *rows = markdown_rows((tmp_path / "comparison.md").read_text())
    assert "balanced" in heads  # on an imbalanced split it is not top-1
    teachers = [dict(zip(heads, row, strict=True)) for row in rows if "teacher" in row]
    assert [(row["top-1"], row["state"]) for row in teachers] == [("-", "not evaluated")] * 2


def test_report_of_a_comparison_begins_with_its_table_and_draws_means(runs: list[Path], report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    assert (
        page.index("Comparison of methods")
        < page.index('id="accuracy_by_group"')
        < page.index("Headline table")
    )
    assert page.index("<details>") < page.index("Headline table") < page.index("</details>")
    assert "Every student on its own (18)" in page
    assert len(read_csv(report / "headline.csv")) == 19
    assert len(read_csv(report / "comparison.csv")) == 7
    models = read_json(runs[1] / "evaluation.json")["models"]
    rows = {row["name"]: row for row in read_csv(report / "accuracy_by_group.csv")}
    assert list(rows) == ["teacher", *(f"{m}, {model}" for model in ("resnet8", "resnet20") for m in METHODS)]
    values = [models[f"bsm.resnet20.s{seed}"]["metrics"]["few"] for seed in range(3)]
    assert float(rows["bsm, resnet20"]["few"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(rows["bsm, resnet20"]["few_std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert set(FIGURES) <= {path.stem for path in report.glob("*.png")}


def test_curves_and_classes_of_a_comparison_are_means_over_the_students_that_finished(
    runs: list[Path], report: Path
) -> None:
    rows = read_csv(report / "curves.csv")
    own = [row for row in rows if row["name"] == "krd, resnet8"]
    losses = []
    for seed in (0, 2):  # seed 1 failed
        lines = (runs[1] / "students" / f"krd.resnet8.s{seed}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if row["split"] == "train"])
    assert [float(row["train_loss"]) for row in own] == pytest.approx(np.mean(losses, axis=0), rel=1e-12)
    assert len(rows) == 6 * 3
    models = read_json(runs[1] / "evaluation.json")["models"]
    classes = read_csv(report / "accuracy_by_class_count.csv")
    drawn = [float(row["accuracy"]) for row in classes if row["name"] == "krd, resnet8"]
    per_class = [models[f"krd.resnet8.s{seed}"]["per_class_accuracy"] for seed in (0, 2)]
    assert drawn == pytest.approx(np.mean(per_class, axis=0), rel=1e-12)


def test_report_of_a_comparison_that_has_only_begun_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", methods=METHODS, models=("resnet8",), evaluated=False, ledger=False)
    for name in ("ce.resnet8.s0", "krd.resnet8.s2"):
        (run_dir / "students" / name / "result.json").unlink()
    page = build_report(run_dir).read_text(encoding="utf-8")
    assert "No student is evaluated on the test split." in page
    assert "1 of 3 unfinished" in page


def test_cost_figure_goes_by_parameters_and_latency(report: Path) -> None:
    rows = read_csv(report / "accuracy_by_cost.csv")
    found = {(row["model"], int(row["num_params"]), float(row["latency_ms"])) for row in rows}
    assert found == {("resnet8", 80_000, 1.2), ("resnet20", 270_000, 4.1), ("resnet110", 1_730_000, 25.5)}


def test_latency_of_two_machines_is_not_passed_off_as_one(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", methods=METHODS, ratio=50)
    evaluation = read_json(other / "evaluation.json")
    evaluation["latency"]["cpu"] = "Abacus 6"
    write_json(other / "evaluation.json", evaluation)
    assert "not comparable" in latency_note([read_run(runs[0]), read_run(other)])
    assert "not comparable" not in latency_note([read_run(path) for path in runs])
    assert latency_note([read_run(write_run(tmp_path / "old", latency=False))]) == ""


def test_terminal_shows_a_row_a_method_with_the_true_number_of_seeds(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    print_headline(runs[1])
    printed = capsys.readouterr().out
    assert "mean ± standard deviation over 2 to 3 seeds (0, 1, 2)" in printed
    assert "krd.resnet8.s0" not in printed
    assert "1 of 3 failed" in printed
    assert "forwards_per_unique_view: 1.000" in printed
    cell = next(cell for cell in compare_runs([runs[1]]).cells if cell["method"] == "bsm")
    assert f"{100 * cell['top1']:.1f} ± {100 * cell['top1_std']:.1f}" in printed


@pytest.mark.parametrize(("second", "line"), [(0, "one seed"), (4, "one seed per student (of 0, 4)")])
def test_terminal_of_a_small_run_shows_its_students_and_how_many_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: int, line: str
) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        text.replace("- name: ce-resnet8", f"- seed: {second}\n  name: ce-resnet8")
    )
    print_headline(run_dir)
    printed = capsys.readouterr().out
    assert f"accuracy on the test split, {line}\n" in printed
    assert "krd-resnet8" in printed
    assert "forwards_per_unique_view: 1.000" in printed


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", methods=METHODS, models=("resnet8",), seeds=(3,))
    said = " ".join(notes(compare_runs([run_dir])))
    assert "one seed (3)" in said
    assert "none is called best" in said
    assert "±" not in as_markdown(compare_runs([run_dir]))
