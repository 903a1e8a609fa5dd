"""Answers whether the report shows what the run directory holds: every number, every student, every gap."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from krd_ray.report import tables
from krd_ray.report.page import build_report
from krd_ray.report.read_run import read_run
from krd_ray.report.sections import FIGURES
from krd_ray.report.tables import headline_rows
from tests.unit.report_runs import ERROR, NUM_CLASSES, read_csv, read_json, write_run


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one teacher and four students, one of them failed, with its report."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "demo", failed="krd-resnet20")
    assert build_report(run_dir) == run_dir / "report" / "index.html"
    return run_dir


@pytest.fixture(scope="module")
def page(reported: Path) -> str:
    return (reported / "report" / "index.html").read_text(encoding="utf-8")


def test_page_needs_no_network_no_script_and_no_other_file_to_be_seen(page: str) -> None:
    sources = re.findall(r'src="([^"]*)"', page)
    links = re.findall(r'href="([^"]*)"', page)
    assert len(sources) == len(FIGURES) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link rel=.stylesheet|@import|url\(", page)
    assert all(link.startswith(("#", "data:,")) or link.endswith((".csv", ".png")) for link in links)


def test_every_link_and_anchor_leads_somewhere(reported: Path, page: str) -> None:
    for link in re.findall(r'href="([^"]*)"', page):
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in page
        elif link != "data:,":
            assert (reported / "report" / link).is_file()


def test_embedded_pictures_are_the_files_beside_the_page(reported: Path, page: str) -> None:
    embedded = [base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    files = [(reported / "report" / f"{key}.png").read_bytes() for key in FIGURES]
    assert sorted(embedded) == sorted(files)
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5000 for content in files)


def test_group_csv_holds_the_evaluated_numbers_to_the_last_digit(reported: Path) -> None:
    models = read_json(reported / "evaluation.json")["models"]
    rows = {row["name"]: row for row in read_csv(reported / "report" / "accuracy_by_group.csv")}
    assert list(rows) == ["teacher", "krd-resnet8", "ce-resnet8", "krd-resnet20", "ce-resnet20"]
    for name, entry in models.items():
        metrics = entry["metrics"]
        assert [float(rows[name][key]) for key in ("many", "medium", "few")] == [
            metrics["many"],
            metrics["medium"],
            metrics["few"],
        ]
        assert float(rows[name]["overall"]) == metrics["top1"]
    assert (rows["krd-resnet20"]["status"], rows["krd-resnet20"]["overall"]) == ("failed", "")


def test_class_csv_pairs_each_class_with_its_count_and_accuracy(reported: Path) -> None:
    counts = read_json(reported / "dataset.json")["splits"]["train"]["class_counts"]
    rows = read_csv(reported / "report" / "accuracy_by_class_count.csv")
    own = [row for row in rows if row["name"] == "ce-resnet8"]
    expected = read_json(reported / "evaluation.json")["models"]["ce-resnet8"]["per_class_accuracy"]
    assert len(rows) == 4 * NUM_CLASSES
    assert [(int(row["class_count"]), float(row["accuracy"])) for row in own] == list(
        zip(counts, expected, strict=True)
    )


def test_size_time_teacher_and_class_csvs_hold_the_inputs(reported: Path) -> None:
    folder, ledger = reported / "report", read_json(reported / "ledger.json")
    sizes = {row["name"]: int(row["num_params"]) for row in read_csv(folder / "accuracy_by_cost.csv")}
    assert sizes == {
        "teacher": 1_730_000,
        "krd-resnet8": 80_000,
        "ce-resnet8": 80_000,
        "ce-resnet20": 270_000,
    }
    for row in read_csv(folder / "time_split.csv"):
        account = ledger["students"][row["name"]]
        assert [float(row[key]) for key in tables.TIMES] == [account[key] for key in tables.TIMES]
    work = {row["quantity"]: int(row["targets"]) for row in read_csv(folder / "teacher_work.csv")}
    forwards, hits = ledger["teacher"]["forwards"], ledger["teacher"]["hits"]
    assert work == {
        "served": 4 * forwards,
        "hits": hits,
        "joined": forwards,
        "forwards": forwards,
        "unique_views": forwards,
    }
    drawn = [int(row["class_count"]) for row in read_csv(folder / "class_distribution.csv")]
    assert drawn == sorted(
        read_json(reported / "dataset.json")["splits"]["train"]["class_counts"], reverse=True
    )


def test_curve_csv_holds_one_row_for_each_epoch_of_each_student(reported: Path) -> None:
    rows = read_csv(reported / "report" / "curves.csv")
    assert len(rows) == 3 * 3 + 1  # three finished students of three epochs, one failed after its first
    written = (reported / "students" / "ce-resnet8" / "metrics.jsonl").read_text().splitlines()
    val = [row["balanced"] for row in map(json.loads, written) if row["split"] == "val"]
    train = [row["loss"] for row in map(json.loads, written) if row["split"] == "train"]
    own = [row for row in rows if row["name"] == "ce-resnet8"]
    assert [float(row["val_balanced"]) for row in own] == val
    assert [float(row["train_loss"]) for row in own] == train


def test_failed_student_keeps_its_row_and_shows_its_error_escaped(page: str) -> None:
    assert "krd-resnet20" in page
    assert page.count("loss is &lt;NaN&gt; in term") == 2  # under the results and in full below
    assert "<NaN>" not in page
    assert "3 of 4" in page


def test_headline_goes_teacher_first_then_small_to_large(reported: Path) -> None:
    rows = headline_rows(read_run(reported))
    assert [row["name"] for row in rows] == [
        "teacher",
        "krd-resnet8",
        "ce-resnet8",
        "krd-resnet20",
        "ce-resnet20",
    ]
    assert [row["num_params"] for row in rows] == [1_730_000, 80_000, 80_000, 270_000, 270_000]
    expected = read_json(reported / "evaluation.json")["models"]["ce-resnet20"]["metrics"]
    assert {key: rows[4][key] for key in expected} == expected
    assert (rows[4]["images_per_s"], rows[4]["wait_frac"], rows[4]["status"]) == (812.0, 0.08, "finished")
    assert (rows[3]["status"], rows[3]["error"], rows[3]["top1"]) == ("failed", ERROR, None)


def test_page_states_split_seed_and_that_one_seed_has_no_spread(page: str) -> None:
    assert "on the test split (840 images)" in page
    assert "One run is one seed (seed 0), so no spread can be stated" in page


def test_building_twice_writes_the_same_bytes_and_leaves_no_other_file(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    build_report(run_dir)
    first = {path.name: path.read_bytes() for path in (run_dir / "report").iterdir()}
    build_report(run_dir)
    assert {path.name: path.read_bytes() for path in (run_dir / "report").iterdir()} == first
    assert len(first) == 2 * len(FIGURES) + 2


def test_missing_pieces_are_named_and_their_old_pictures_go(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    build_report(run_dir)
    (run_dir / "evaluation.json").unlink()
    (run_dir / "ledger.json").unlink()
    (run_dir / "environment.json").unlink()
    text = build_report(run_dir).read_text(encoding="utf-8")
    assert text.count("No evaluation yet") == 4
    assert text.count("No ledger yet") == 3
    assert "No environment.json" in text
    assert text.count("data:image/png") == 2  # curves and classes
    assert {path.stem for path in (run_dir / "report").glob("*.png")} == {"curves", "class_distribution"}
    assert [row["status"] for row in headline_rows(read_run(run_dir))] == [
        "not tested",
        "finished",
        "finished",
    ]


def test_run_without_teacher_and_without_val_split_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",), teacher=False, val=False)
    text = build_report(run_dir).read_text(encoding="utf-8")
    assert "No teacher in this run (teacher: null), so no targets were served." in text
    assert "This data set has no val split, so there is no validation curve." in text
    assert "no teacher in this run" in text
    assert {row["role"] for row in headline_rows(read_run(run_dir))} == {"student"}


def test_run_that_has_only_begun_still_gets_a_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",), evaluated=False, ledger=False)
    for name in ("krd-resnet8", "ce-resnet8"):
        (run_dir / "students" / name / "result.json").unlink()
    (run_dir / "students" / "ce-resnet8" / "metrics.jsonl").unlink()
    (run_dir / "students" / "ce-resnet8").rmdir()
    text = build_report(run_dir).read_text(encoding="utf-8")
    status = {row["name"]: row["status"] for row in headline_rows(read_run(run_dir))}
    assert status == {"teacher": "not tested", "krd-resnet8": "unfinished", "ce-resnet8": "not started"}
    assert "not started" in text
    assert "0 of 2" in text


def test_report_imports_neither_ray_nor_torch_nor_other_parts_of_the_package() -> None:
    code = "import sys, krd_ray.report.page, krd_ray.report.comparison_page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert not {"ray", "torch", "pydantic", "pandas"} & set(found)
    own = {name for name in found if name.startswith("krd_ray")}
    assert {name for name in own if not name.startswith("krd_ray.report")} == {
        "krd_ray",
        "krd_ray.atomic",
        "krd_ray.errors",
    }
