"""The page of a search, from the files that a search leaves and nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from krd_ray.errors import RunError
from krd_ray.report.read_run import read_run
from krd_ray.report.read_search import PARAM, is_search, read_search
from krd_ray.report.search_page import FIGURES, build_search_report
from krd_ray.report.search_tables import cost_rows, front_rows, history_rows, kind_of, slice_rows, trial_table
from krd_ray.report.search_text import best_line, cost_line, objective
from krd_ray.report.tables import headline_rows
from krd_ray.report.verdict import Difference, differences, sentence
from tests.unit.report_runs import write_run

VALUES = {
    "val/many": 0.6,
    "val/medium": 0.4,
    "val/balanced": 0.4,
    "val/worst_class": 0.0,
    "val/harmonic_mean": 0.0,
}
OTHERS = {"val/ece": 0.1, "val/loss": 2.0}


def trial(number: int, few: float | None, state: str = "complete", **more: Any) -> dict[str, Any]:
    params = {
        f"{PARAM}loss.rrd.weight": 0.1 * 10**number,
        f"{PARAM}loss.rrd.target": "mix" if number % 2 else "teacher",
    }
    row = {"number": number, "state": state, "baseline": False, "from": None, "val/top1": few, **VALUES}
    return row | {"val/few": few, **OTHERS, "epochs": 4, "seconds": 2.5, **params, "error": None} | more


TRIALS = [
    trial(0, 0.2, baseline=True, **{f"{PARAM}loss.rrd.weight": None}),
    trial(1, 0.1),
    trial(2, 0.3),
    trial(3, 0.05, "stopped", epochs=1),
    trial(4, None, "failed", error="the loss is not finite, at epoch 0\nand more"),
    trial(5, 0.25, **{"from": "earlier"}),
]


def write_search(root: Path, trials: list[dict[str, Any]] = TRIALS, **more: Any) -> Path:
    root.mkdir(exist_ok=True)
    record = {
        "name": "run",
        "student": "s",
        "metric": ["val/few"],
        "mode": ["max"],
        "baseline": True,
        "space": {"file": "space.py", "from": "weights.py", "hash": "abc"},
        "options": {"epochs": 4, "seed": 0, "confirm_seeds": []},
        "counts": {"complete": 3, "stopped": 1, "failed": 1},
        "seconds": [60.0],
        "best": {
            "number": 2,
            "baseline": False,
            "values": {"val/few": 0.3},
            "settings": {"loss.rrd.weight": 10.0},
        },
        "front": [2],
        "importance": {"val/few": {"loss.rrd.weight": 0.75, "loss.rrd.target": 0.25}},
    } | more
    shared = {
        "trial_seconds": 90.0,
        "forwards_one_teacher_per_trial": 1600,
        "forwards": 400,
        "forwards_saved": 1200,
    }
    teacher = {"forwards": 400}
    ledger = {"search": shared, "teacher": teacher, "forwards_per_unique_view": 1.0, "A": 1.5, "A_star": 2.0}
    (root / "search.json").write_text(json.dumps(record))
    (root / "ledger.json").write_text(json.dumps(ledger))
    (root / "dataset.json").write_text(json.dumps({"name": "digits", "num_classes": 10}))
    (root / "base.yaml").write_text("name: run\n")
    (root / "best.yaml").write_text("name: run # <best>\n")
    (root / "space.py").write_text("METRIC = 'val/few'\n")
    if trials:
        with (root / "trials.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(trials[0]))
            writer.writeheader()
            writer.writerows(trials)
    return root


def test_page_stands_alone_and_every_picture_has_its_numbers(tmp_path: Path) -> None:
    page = build_search_report(write_search(tmp_path))
    text = page.read_text()
    drawn = [key for key in FIGURES if (page.parent / f"{key}.png").is_file()]
    assert drawn == ["history", "importance", "slices", "tail_against_head", "forwards"]
    assert [key for key in FIGURES if (page.parent / f"{key}.csv").is_file()] == drawn
    assert text.count("data:image/png;base64,") == len(drawn)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "Trial 2 is best: val/few 30.0%." in text
    assert "the loss is not finite, at epoch 0" in text
    assert "Not asked for (--no-confirm)" in text
    assert "name: run # &lt;best&gt;" in text
    assert is_search(tmp_path)


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    best = {"number": 2, "baseline": False, "values": {"val/few": 0.3, "val/top1": 0.3}, "settings": {}}
    two = {"metric": ["val/few", "val/top1"], "mode": ["max", "max"], "front": [2, 1], "best": best}
    search = read_search(write_search(tmp_path, **two))
    assert [row["number"] for row in front_rows(search) if row["on_front"]] == [1, 2]
    page = build_search_report(tmp_path)
    assert (page.parent / "front.png").is_file()
    assert "2 trials lie on the front" in best_line(search)
    assert objective(search) == "largest val/few and largest val/top1"


def test_search_without_a_trial_has_a_page_that_says_so(tmp_path: Path) -> None:
    write_search(tmp_path, [], best=None, front=[], importance={}, counts={})
    (tmp_path / "ledger.json").unlink()
    (tmp_path / "best.yaml").unlink()
    text = build_search_report(tmp_path).read_text()
    assert "No trial has been validated yet." in text
    assert "No trial has completed yet." in text


def test_best_so_far_counts_complete_trials_of_this_search_only(tmp_path: Path) -> None:
    rows = history_rows(read_search(write_search(tmp_path)))
    assert [row["best_so_far"] for row in rows] == [0.2, 0.2, 0.3, 0.3, 0.3]
    kinds = ["baseline", "complete", "best", "stopped early", "from an earlier search"]
    assert [row["kind"] for row in rows] == kinds


def test_slices_leave_out_what_a_trial_did_not_draw(tmp_path: Path) -> None:
    rows = slice_rows(read_search(write_search(tmp_path)))
    assert [row["number"] for row in rows if row["parameter"] == "loss.rrd.weight"] == [1, 2, 3, 5]
    assert {row["setting"] for row in rows if row["parameter"] == "loss.rrd.target"} == {"mix", "teacher"}


def test_table_begins_with_the_best_and_ends_with_failures(tmp_path: Path) -> None:
    search = read_search(write_search(tmp_path))
    assert [row["number"] for row in trial_table(search)] == [2, 5, 0, 1, 3, 4]
    assert kind_of(search, search.trials[2]) == "best"
    assert search.trials[4]["error"] == "the loss is not finite, at epoch 0\nand more"


def test_cost_is_stated_against_one_teacher_per_trial(tmp_path: Path) -> None:
    search = read_search(write_search(tmp_path))
    assert [row["forwards"] for row in cost_rows(search)] == [1600, 400]
    assert "400 teacher forwards (1.000 per unique view); 1,600 with one teacher per trial" in cost_line(
        search
    )


@pytest.mark.parametrize(
    ("gain", "spreads", "pairs", "words"),
    [
        (
            0.02,
            (0.01, 0.01, 0.01),
            3,
            "the best beats the baseline by +2.0 \N{PLUS-MINUS SIGN} 1.0 points over 3 seeds",
        ),
        (0.02, (0.03, 0.01, 0.01), 3, "not more than the spread, so no gain is claimed"),
        (0.02, (0.01, 0.03, 0.01), 3, "not more than the spread, so no gain is claimed"),
        (-0.02, (0.01, 0.01, 0.01), 3, "the best does not beat the baseline: -2.0"),
        (0.02, (None, None, None), 1, "with one seed, which has no spread: not to be told from chance"),
    ],
)
def test_verdict_is_honest(gain: float, spreads: tuple[float | None, ...], pairs: int, words: str) -> None:
    own, best, baseline = spreads
    difference = Difference("few", 0.3 + gain, best, 0.3, baseline, gain, own, pairs)
    assert words in sentence(difference)
    assert difference.is_clear == ("beats the baseline by" in sentence(difference))


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a search directory: it has no search\.json"):
        read_search(tmp_path)
    write_search(tmp_path)
    (tmp_path / "search.json").write_text('{"metric": []}')
    with pytest.raises(RunError, match="has no mode; it was written by another version"):
        read_search(tmp_path)


def test_confirmation_is_read_seed_by_seed_from_its_run_and_shown(tmp_path: Path) -> None:
    confirm = {"options": {"epochs": 4, "seed": 0, "confirm_seeds": [0, 1, 2]}, "confirm_epochs": 20}
    write_search(tmp_path, **confirm)
    assert "Not finished yet" in build_search_report(tmp_path).read_text()
    losses = {"baseline": "cross_entropy", "best": "balanced_softmax+rrd+lrd"}
    run = write_run(tmp_path / "confirm/2", models=("resnet8",), methods=losses)
    found = {each.metric: each for each in differences(run)}
    assert found["few"].num_pairs == 3
    assert found["few"].gain == pytest.approx(found["few"].best - found["few"].baseline)
    few = [row["few"] for row in headline_rows(read_run(run)) if row["name"].startswith("best.")]
    assert found["few"].best == pytest.approx(sum(few) / 3)
    text = build_search_report(tmp_path).read_text()
    assert "Both trained with 20 epochs from the same teacher" in text
    assert sentence(found["few"]).split(":")[0] in text
