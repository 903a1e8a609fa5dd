"""Answers whether the report shows what the run directory holds: every number, every student, every gap."""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from krd_ray.errors import RunError
from krd_ray.report import tables
from krd_ray.report.labels import Box, Stem, place_labels
from krd_ray.report.page import FIGURES, build_report
from krd_ray.report.palette import loss_palette
from krd_ray.report.read_run import last_rows, parse_metric_lines, read_run
from krd_ray.report.tables import binned_means, group_of, headline_rows

NUM_CLASSES = 12
MODELS = {
    "resnet8": (80_000, 12_000_000),
    "resnet20": (270_000, 41_000_000),
    "resnet56": (860_000, 126_000_000),
}
LOSSES = {"krd": "balanced_softmax+rrd+lrd", "ce": "cross_entropy"}
ERROR = "step 14: loss is <NaN> in term 'lrd', ids 3, 9"


def write_run(
    folder: Path,
    *,
    models: tuple[str, ...] = ("resnet8", "resnet20"),
    num_classes: int = NUM_CLASSES,
    num_epochs: int = 3,
    teacher: bool = True,
    evaluated: bool = True,
    ledger: bool = True,
    val: bool = True,
    failed: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a run directory as a run would, with made-up numbers; returns it."""
    rng = np.random.default_rng(seed)
    counts = [max(3, round(500 * 100 ** (-index / (num_classes - 1)))) for index in range(num_classes)]
    students = {f"{short}-{model}": (model, loss) for model in models for short, loss in LOSSES.items()}
    config = {
        "name": "demo-lt",
        "seed": seed,
        "teacher": {"weights": "teacher.safetensors", "model": "resnet110"} if teacher else None,
        "students": [{"name": name, "model": model} for name, (model, _) in students.items()],
        "train": {"epochs": num_epochs, "lr": 0.1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "environment.json", {"python": "3.11.2", "torch": "2.8.0", "device": "cpu, 2 cores"})
    splits = {name: split(rng, num_classes) for name in ("val", "test")}
    if not val:
        del splits["val"]
    write_json(
        folder / "dataset.json",
        {
            "name": "demo",
            "classes": [f"class {index}" for index in range(num_classes)],
            "num_classes": num_classes,
            "splits": {"train": {"num_rows": sum(counts), "class_counts": counts}, **splits},
            "long_tail": {"profile": "exponential", "imbalance_ratio": 100.0},
        },
    )
    entries: dict[str, Any] = {}
    if teacher:
        entries["teacher"] = model_entry(rng, counts, "teacher", "resnet110", 0.12)
    for name, (model, loss) in students.items():
        gain = 0.03 * list(MODELS).index(model) + (0.05 if loss != "cross_entropy" else -0.03)
        status = "failed" if name == failed else "finished"
        write_student(folder / "students" / name, name, model, loss, status, num_epochs, gain, val, rng)
        if status == "finished":
            entries[name] = model_entry(rng, counts, "student", model, gain, tail_gain=gain)
    if evaluated:
        write_json(folder / "evaluation.json", {"split": "test", "num_samples": 1200, "models": entries})
    if ledger:
        write_json(folder / "ledger.json", ledger_entry(list(students), sum(counts) * num_epochs, teacher))
    return folder


def split(rng: np.random.Generator, num_classes: int) -> dict[str, Any]:
    per_class = int(rng.integers(20, 100))
    return {"num_rows": per_class * num_classes, "class_counts": [per_class] * num_classes}


def model_entry(
    rng: np.random.Generator, counts: list[int], role: str, model: str, gain: float, tail_gain: float = 0.0
) -> dict[str, Any]:
    log_share = np.log(np.asarray(counts) / counts[-1]) / np.log(counts[0] / counts[-1])
    mean = 0.30 + gain + tail_gain + (0.5 - tail_gain) * log_share
    accuracy = np.clip(mean + 0.07 * rng.standard_normal(len(counts)), 0.01, 0.99)
    pairs = list(zip(accuracy, map(group_of, counts), strict=True))
    groups = {name: [value for value, group in pairs if group == name] for name in tables.GROUPS}
    params, flops = MODELS.get(model, (1_730_000, 255_000_000))
    return {
        "role": role,
        "model": model,
        "num_params": params,
        "num_flops": flops,
        "metrics": {
            "top1": accuracy.mean(),
            **{name: float(np.mean(values)) if values else None for name, values in groups.items()},
            "balanced": accuracy.mean(),
            "worst_class": accuracy.min(),
            "harmonic_mean": len(counts) / (1 / accuracy).sum(),
            "ece": 0.05 + 0.1 * rng.random(),
            "agreement": 0.6 + 0.2 * rng.random() if role == "student" else None,
        },
        "per_class_accuracy": accuracy.tolist(),
    }


def write_student(
    folder: Path, name: str, model: str, loss: str, status: str, num_epochs: int, gain: float, val: bool,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done = num_epochs if status == "finished" else 1
    rows: list[dict[str, Any]] = []
    for epoch in range(done):
        shared = {
            "time": 1.7e9 + epoch,
            "student": name,
            "attempt": 0,
            "epoch": epoch,
            "step": 12 * (epoch + 1),
        }
        level = 1 - np.exp(-3 * (epoch + 1) / num_epochs) + 0.02 * rng.standard_normal()
        rows.append({**shared, "split": "progress", "loss": 9.0, "images_per_s": 1.0})
        rows.append({**shared, "split": "train", "loss": 3.2 - 2.2 * level, "images_per_s": 812.0})
        if val:
            accuracy = max(0.0, (0.5 + gain) * level)
            rows.append(
                {**shared, "split": "val", "loss": 2.0, "top1": accuracy + 0.02, "balanced": accuracy}
            )
        rows.append({**shared, "split": "coverage", "seen": 400, "missed": 0, "doubled": 0, "left_out": 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params, flops = MODELS[model]
    result = {
        "student": name, "model": model, "loss_name": loss, "status": status,
        "error": ERROR if status == "failed" else None, "epochs_done": done, "num_params": params,
        "num_flops": flops, "seconds": 340.5, "restarts": int(status == "failed"), "images_per_s": 812.0,
        "wait_frac": 0.08,
    }  # fmt: skip
    write_json(folder / "result.json", result)


def ledger_entry(names: list[str], num_samples: int, teacher: bool) -> dict[str, Any]:
    students = {
        name: {
            "samples": num_samples, "compute_s": 300.0 + 40 * index, "wait_targets_s": 25.0 - 2 * index,
            "wait_data_s": 4.0 + index, "cpu_s": 500.0, "requests": 120, "retries": index % 2, "restarts": 0,
        }
        for index, name in enumerate(names)
    }  # fmt: skip
    served = {
        "forwards": num_samples, "unique_views": num_samples, "hits": num_samples * (len(names) - 2),
        "joined": num_samples, "busy_s": 210.0, "idle_s": 190.0, "bytes_in": 3 << 26, "bytes_out": 5 << 24,
        "restarts": 1, "padded_rows": 96, "calibration_forwards": 2000, "store_memory_bytes": 7 << 20,
        "store_disk_bytes": 0, "replicas": 2, "rows": num_samples * len(names),
    }  # fmt: skip
    measured = {
        "forwards_per_unique_view": 1.0,
        "cost_teacher_s_per_sample": 0.0021,
        "A": 2.31,
        "A_star": 2.55,
    }
    nothing = dict.fromkeys(measured)
    return {
        "students": students,
        "teacher": served if teacher else None,
        **(measured if teacher else nothing),
        "eta": 0.906 if teacher else None,
        "cost_student_s_per_sample": dict.fromkeys(names, 0.003),
        "driver_bytes": {"pixels": 0, "targets": 0},
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


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
    assert len(sources) == len(FIGURES) == 7
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
    sizes = {row["name"]: int(row["num_params"]) for row in read_csv(folder / "accuracy_by_params.csv")}
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
    assert "on the test split (1,200 images)" in page
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
    assert text.count("No ledger yet") == 2
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


def test_last_attempt_of_an_epoch_wins(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    metrics = run_dir / "students" / "ce-resnet8" / "metrics.jsonl"
    again = {"split": "val", "epoch": 1, "attempt": 1, "balanced": 0.987, "top1": 0.9}
    with metrics.open("a") as lines:
        lines.write(json.dumps(again) + "\n")
    points = [row for row in tables.curve_rows(read_run(run_dir)) if row["name"] == "ce-resnet8"]
    assert [row["epoch"] for row in points] == [0, 1, 2]
    assert (points[1]["val_balanced"], points[1]["val_top1"]) == (0.987, 0.9)
    assert points[2]["val_balanced"] != 0.987


def test_last_rows_come_in_epoch_order_whatever_the_file_order() -> None:
    rows = [{"split": "train", "epoch": e, "attempt": a} for e, a in ((0, 0), (2, 0), (1, 0), (2, 1), (0, 1))]
    found = last_rows([*rows, {"split": "progress", "epoch": 7, "attempt": 1}], "train")
    assert [(row["epoch"], row["attempt"]) for row in found] == [(0, 1), (1, 0), (2, 1)]


@pytest.mark.parametrize("length", range(1, 42, 8))
def test_half_written_last_line_is_not_there_yet(length: int) -> None:
    whole = b'{"split": "val", "epoch": 0, "top1": 0.5}'
    rows, num_broken = parse_metric_lines(whole + b"\n" + whole[:length])
    assert (len(rows), num_broken) == (2 if length == len(whole) else 1, 0)


def test_line_cut_by_a_killed_process_is_counted_and_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    metrics = run_dir / "students" / "ce-resnet8" / "metrics.jsonl"
    metrics.write_bytes(b'{"split": "va{"split": "val", "epoch": 0}\n' + metrics.read_bytes())
    broken = {row["name"]: row["num_broken_lines"] for row in tables.health_rows(read_run(run_dir))}
    assert broken == {"krd-resnet8": 0, "ce-resnet8": 1}
    assert len(tables.curve_rows(read_run(run_dir))) == 6


def test_nan_is_a_missing_value_not_a_number(tmp_path: Path) -> None:
    rows, _ = parse_metric_lines(b'{"split": "train", "epoch": 0, "loss": NaN, "lr": Infinity}\n')
    assert rows == [{"split": "train", "epoch": 0, "loss": None, "lr": None}]
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    evaluation = read_json(run_dir / "evaluation.json")
    evaluation["models"]["teacher"]["metrics"]["few"] = float("nan")
    write_json(run_dir / "evaluation.json", evaluation)
    assert headline_rows(read_run(run_dir))[0]["few"] is None


def test_folder_that_is_no_run_directory_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no config\.yaml and no dataset\.json"):
        build_report(tmp_path)
    with pytest.raises(RunError, match="is not a directory"):
        build_report(tmp_path / "nowhere")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{"split": "te', r"evaluation\.json is not valid JSON"),
        ("evaluation.json", "[]", r"evaluation\.json holds list"),
        ("evaluation.json", '{"split": "test", "num_samples": 1}', r"evaluation\.json has no models"),
        ("ledger.json", "{}", r"ledger\.json has no students, teacher"),
        ("config.yaml", "a: [", r"config\.yaml is not valid YAML"),
        ("config.yaml", "students: [small]", r"config\.yaml: students must be a list"),
        ("dataset.json", '{"name": "x"}', r"dataset\.json has no classes, num_classes, splits"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    (run_dir / name).write_text(content)
    with pytest.raises(RunError, match=message):
        read_run(run_dir)


def test_per_class_list_of_another_length_is_refused(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    evaluation = read_json(run_dir / "evaluation.json")
    evaluation["models"]["teacher"]["per_class_accuracy"].pop()
    write_json(run_dir / "evaluation.json", evaluation)
    with pytest.raises(RunError, match=r"models\.teacher\.per_class_accuracy has 11 entries .* 12 classes"):
        read_run(run_dir)


def test_losses_keep_their_colour_and_marker_apart() -> None:
    names = ["a", "b", "c", "d", "e", "f", "g", "h"]
    palette = loss_palette(name for name in [*names, None, "a"])
    assert len(set(palette.values())) == len(palette) == 9
    assert [palette[name] for name in names] == [loss_palette(reversed(names))[name] for name in names]


@given(
    pairs=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1)), min_size=1, max_size=60),
    num_bins=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_bins_cover_every_class_once(pairs: list[tuple[int, float]], num_bins: int) -> None:
    counts, values = [count for count, _ in pairs], [value for _, value in pairs]
    points = binned_means(counts, values, num_bins)
    places = [place for place, _ in points]
    assert 1 <= len(points) <= num_bins
    assert places == sorted(set(places))
    assert min(counts) * (1 - 1e-9) <= places[0] <= places[-1] <= max(counts) * (1 + 1e-9)
    assert min(values) - 1e-9 <= min(y for _, y in points) <= max(y for _, y in points) <= max(values) + 1e-9
    assert binned_means(counts, values, 1)[0][1] == pytest.approx(sum(values) / len(values))


@given(
    places=st.lists(st.tuples(st.floats(0.3, 4.4), st.floats(0.3, 1.2), st.floats(0, 0.9)), max_size=3),
)
@example(places=[(1.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.5, 1.125, 0.5)])
@settings(max_examples=25, deadline=None)
def test_a_few_names_never_cover_each_other(places: list[tuple[float, float, float]]) -> None:
    stems = [Stem(x, low, low + length, width=0.6, height=0.13) for x, low, length in places]
    names = place_labels(stems, Box(0, 0, 4.7, 2.4), marker=0.1)
    assert len(names) == len(stems)
    for index, name in enumerate(names):
        assert name.right - name.left == pytest.approx(0.6)
        assert all(name.overlap(other) < 1e-9 for other in names[:index])


def test_report_imports_neither_ray_nor_torch_nor_other_parts_of_the_package() -> None:
    code = "import sys, krd_ray.report.page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert not {"ray", "torch", "pydantic", "pandas"} & set(found)
    own = {name for name in found if name.startswith("krd_ray")}
    assert {name for name in own if not name.startswith("krd_ray.report")} == {"krd_ray", "krd_ray.errors"}


def read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
