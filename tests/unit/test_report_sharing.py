"""Answers whether page and terminal say what sharing cost, where eta was lost and who holds memory, or why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from krd_ray.report.page import build_report
from krd_ray.report.read_run import read_run
from krd_ray.report.sharing import losses, sharing_rows
from krd_ray.report.terminal import print_headline
from tests.unit.report_runs import ledger_entry, read_csv, read_json, write_json, write_run

NEW_OF_RUN = ("alone_cpu_s", "measured_cpu_s", "ideal_cpu_s", "eta_loss")
NEW_OF_STUDENT = ("marginal_cost", "teacher_cpu_s", "private_bytes_peak", "private_bytes_per_epoch")
NEW_OF_TEACHER = ("protocol_cpu_s", "private_bytes_peak")


def with_ledger(folder: Path, **changes: Any) -> Path:
    """A run whose ledger was changed: entries of the teacher as `teacher`, others by name."""
    run_dir = write_run(folder, models=("resnet8",))
    ledger = read_json(run_dir / "ledger.json")
    ledger["teacher"] |= changes.pop("teacher", {})
    write_json(run_dir / "ledger.json", ledger | changes)
    return run_dir


def printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The terminal's last line, which is the ledger's."""
    print_headline(run_dir)
    return capsys.readouterr().out.splitlines()[-1]


def test_bars_add_up_to_the_ledgers_totals_and_name_each_student_once(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    build_report(run_dir)
    rows, ledger = read_csv(run_dir / "report" / "sharing_bound.csv"), read_json(run_dir / "ledger.json")
    for bar, key in (("alone", "alone_cpu_s"), ("run", "measured_cpu_s"), ("ideal", "ideal_cpu_s")):
        own = [row for row in rows if row["bar"] == bar]
        assert sum(float(row["cpu_s"]) for row in own) == pytest.approx(ledger[key], rel=1e-12)
        assert [row["student"] for row in own if row["part"] == "steps"] == list(ledger["students"])


def test_losses_come_largest_first_and_make_up_what_eta_lacks() -> None:
    ledger = ledger_entry(["a", "b"], 4000, teacher=True)
    parts = losses(ledger)
    assert [share for _, share in parts] == sorted((share for _, share in parts), reverse=True)
    assert parts[0][0] == "the students outside their steps"
    assert sum(share for _, share in parts) == pytest.approx(1 - ledger["eta"])


def test_page_says_bound_loss_marginal_cost_and_memory(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    page, ledger = build_report(run_dir).read_text(encoding="utf-8"), read_json(run_dir / "ledger.json")
    assert (
        f"A {ledger['A']:.2f} of at most A* {ledger['A_star']:.2f}: η = A / A* = {ledger['eta']:.3f}." in page
    )
    name, share = losses(ledger)[0]
    assert f"{name}: {100 * share:.1f} %" in page
    assert "Cost of the next student" in page
    assert "900.0 MiB" in page
    assert "ce-resnet8; +1.5 KiB an epoch" in page


def test_terminal_says_where_eta_was_lost_and_who_holds_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run")
    ledger, line = read_json(run_dir / "ledger.json"), printed(run_dir, capsys)
    share = losses(ledger)[0][1]
    assert f"eta {ledger['eta']:.2f} (lost most to the students outside their steps: {share:.2f})" in line
    assert line.endswith("memory: teacher 900.0 MiB, largest student ce-resnet20 450.0 MiB")


def test_nothing_lost_is_not_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {"teacher_protocol_s": 0.0, "student_protocol_s": {"a": -0.01}, "repeated_forwards_s": 0.0}
    line = printed(with_ledger(tmp_path / "run", eta=1.0, eta_loss=nothing), capsys)
    assert "eta 1.00; memory" in line


def test_run_of_an_earlier_version_still_has_its_page_and_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    ledger = read_json(run_dir / "ledger.json")
    for entry, keys in (
        (ledger, NEW_OF_RUN),
        (ledger["teacher"], NEW_OF_TEACHER),
        *((student, NEW_OF_STUDENT) for student in ledger["students"].values()),
    ):
        for key in keys:
            del entry[key]
    write_json(run_dir / "ledger.json", ledger)
    page, line = build_report(run_dir).read_text(encoding="utf-8"), printed(run_dir, capsys)
    assert "The ledger was written by an earlier version" in page
    assert f"{ledger['eta']:.3f}" in page
    assert "Memory of" not in page
    assert not (run_dir / "report" / "sharing_bound.png").exists()
    assert line.endswith(f"eta {ledger['eta']:.2f}")


@pytest.mark.parametrize(
    ("teacher", "ratio", "reason", "said"),
    [
        (
            {"forwards": 0, "unique_views": 0, "rows": 0, "replicas": 0, "private_bytes_peak": None},
            None,
            "all targets came from a store",
            "forwards_per_unique_view: - (0 forwards, all targets read from the store, 1 teacher restart(s))",
        ),
        (
            {"forwards": 0, "unique_views": 0, "rows": 800},
            None,
            "all targets came from a store",
            "forwards_per_unique_view: - (0 forwards, 800 targets served, 1 teacher restart(s))",
        ),
        (
            {"forwards": 7, "rows": 8},
            1.0,
            "CPU clocks say nothing about work on GPUs",
            "1.000 (7 forwards, 8",
        ),
    ],
)
def test_run_without_a_bound_says_why(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    teacher: dict[str, Any],
    ratio: float | None,
    reason: str,
    said: str,
) -> None:
    unknown = dict.fromkeys((*NEW_OF_RUN, "A", "A_star", "eta", "cost_teacher_s_per_sample"))
    run_dir = with_ledger(tmp_path / "run", teacher=teacher, forwards_per_unique_view=ratio, **unknown)
    assert reason in build_report(run_dir).read_text(encoding="utf-8")
    line = printed(run_dir, capsys)
    assert said in line
    assert "eta" not in line
    assert ("teacher 900.0 MiB" in line) == (teacher.get("private_bytes_peak", 1) is not None)


def test_run_without_a_teacher_had_nothing_to_share(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",), teacher=False)
    assert "there was nothing to share" in build_report(run_dir).read_text(encoding="utf-8")
    assert sharing_rows(read_run(run_dir)) == []


def test_student_that_the_ledger_lost_has_no_steps_but_the_page_is_written(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", models=("resnet8",))
    ledger = read_json(run_dir / "ledger.json")
    del ledger["students"]["ce-resnet8"]
    (run_dir / "ledger.json").write_text(json.dumps(ledger))
    assert build_report(run_dir).is_file()
