"""Answers whether the ledger's figures are right, by hand: what was shared, what it cost, what was lost, memory.

Does not start Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from krd_ray.train.ledger import build_ledger
from krd_ray.train.rundir import MetricsLog, RunDir
from tests.unit.run_builders import train_row, write_student


def stats_row(replica: int | str, incarnation: int, **more: Any) -> dict[str, Any]:
    summed = dict.fromkeys(
        ["requests", "rows", "hits", "joined", "forward_calls", "padded_rows", "bytes_in", "bytes_out"], 10
    )
    seconds = {"busy_s": 1.0, "cpu_s": 8.0, "process_cpu_s": 10.0, "idle_s": 2.0}
    peaks = {"store_memory_bytes": 7, "store_disk_bytes": 0, "queue_peak_rows": 9, "calibration_forwards": 50}
    names = {"replica": replica, "incarnation": incarnation, "restarted": int(incarnation > 0)}
    return {**names, **summed, **seconds, **peaks, "forwards": 100, "unique_views": 100, **more}


def write_stats(run: RunDir, replica: int | str, rows: list[dict[str, Any]], tail: str = "") -> None:
    run.teacher.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (run.teacher / f"stats-{replica}.jsonl").write_text(text)


def test_ledger_figures_by_hand(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2)
    write_student(run, "b", epochs=2)
    write_student(run, "alone", epochs=1)
    early = stats_row(0, 0, forwards=1, cpu_s=0.1, queue_peak_rows=20)
    write_stats(run, 0, [early, stats_row(0, 0)], tail='{"half')
    write_stats(run, 1, [stats_row(1, 0), stats_row(1, 1, unique_views=50)])
    ledger = build_ledger(
        run, ["a", "b", "alone"], taught=["a", "b"], driver_bytes={"pixels": 0}, on_cpu=True
    )

    teacher = ledger["teacher"]
    assert (teacher["forwards"], teacher["unique_views"], teacher["rows"]) == (300, 250, 30)
    assert (teacher["replicas"], teacher["restarts"], teacher["queue_peak_rows"]) == (2, 1, 18)
    assert ledger["forwards_per_unique_view"] == pytest.approx(1.2)
    a = ledger["students"]["a"]
    assert (a["samples"], a["compute_s"], a["wait_targets_s"], a["retries"]) == (200, 6.0, 1.5, 2)
    assert (a["epochs"], a["left_out"], a["restarts"]) == (2, 2, 0)

    c_t, c_i = 24 / 300, 4 / 200
    assert ledger["cost_teacher_s_per_sample"] == pytest.approx(c_t)
    assert ledger["cost_student_s_per_sample"] == pytest.approx({"a": c_i, "b": c_i, "alone": c_i})
    gain = 2 * 200 * (c_t + c_i) / (30 + 2 * 6)
    best = 400 * (c_t + c_i) / (250 * c_t + 400 * c_i)
    assert (ledger["A"], ledger["A_star"]) == (pytest.approx(gain), pytest.approx(best))
    assert ledger["eta"] == pytest.approx(gain / best)
    assert ledger["driver_bytes"] == {"pixels": 0}
    assert ledger["students"]["a"]["marginal_cost"] == pytest.approx(3 / 2)
    assert teacher["protocol_cpu_s"] == pytest.approx(30 - 24)
    assert ledger["eta_loss"] == {
        "teacher_protocol_s": pytest.approx(6),
        "student_protocol_s": pytest.approx({"a": 2, "b": 2}),
        "repeated_forwards_s": pytest.approx(50 * c_t),
    }
    assert (ledger["alone_cpu_s"], ledger["measured_cpu_s"]) == (pytest.approx(40), pytest.approx(42))
    on_gpu = build_ledger(run, ["a", "b"], taught=["a", "b"], driver_bytes={}, on_cpu=False)
    assert [on_gpu[key] for key in ("A", "A_star", "eta", "eta_loss", "ideal_cpu_s")] == [None] * 5
    assert on_gpu["students"]["a"]["marginal_cost"] is None


def lost(ledger: dict[str, Any]) -> float:
    loss = ledger["eta_loss"]
    return float(
        loss["teacher_protocol_s"] + loss["repeated_forwards_s"] + sum(loss["student_protocol_s"].values())
    )


def test_losses_and_the_ideal_add_up_to_what_was_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2, attempts=3)
    write_student(run, "b.s0", epochs=1)
    write_stats(run, 0, [stats_row(0, 0, cpu_s=3.21, process_cpu_s=4.56, forwards=77, unique_views=70)])
    ledger = build_ledger(run, ["a", "b.s0"], taught=["a", "b.s0"], driver_bytes={}, on_cpu=True)
    assert ledger["ideal_cpu_s"] + lost(ledger) == pytest.approx(ledger["measured_cpu_s"], rel=1e-12)
    assert ledger["measured_cpu_s"] == pytest.approx(4.56 + 7 * 3.0)
    assert ledger["A"] == pytest.approx(ledger["A_star"] * ledger["eta"])


def inside(name: str, **more: Any) -> dict[str, Any]:
    """Statistics of a teacher inside a student: it has no CPU time but that of its forwards."""
    return stats_row(name, 0, process_cpu_s=0.0, **more)


def test_teacher_inside_its_students_by_hand(tmp_path: Path) -> None:
    """Students of 100 samples, 1 s of forwards and 2 s of steps each; their processes took 4 s and 3.5 s."""
    run = RunDir(tmp_path)
    for name, cpu_s in (("krd.s0", 4.0), ("krd.s1", 3.5)):
        MetricsLog(run.student(name), name, 0).write("train", 0, 1, **train_row(0, cpu_s=cpu_s))
    idle = dict.fromkeys(["forwards", "unique_views", "requests", "cpu_s", "process_cpu_s"], 0)
    write_stats(run, 0, [stats_row(0, 0, **idle, private_bytes_peak=5)])  # has calibrated and gone
    for name in ("krd.s0.0", "krd.s0.1"):  # two workers share out the samples of one student
        row = inside(name, forwards=50, unique_views=50, cpu_s=0.5)
        write_stats(run, name, [row])
    write_stats(run, "krd.s1.0", [inside("krd.s1.0", cpu_s=1.0)])

    one = build_ledger(run, ["krd.s0"], taught=["krd.s0"], driver_bytes={}, on_cpu=True)
    assert one["students"]["krd.s0"]["teacher_cpu_s"] == pytest.approx(1.0)
    both = build_ledger(run, ["krd.s0", "krd.s1"], taught=["krd.s0", "krd.s1"], driver_bytes={}, on_cpu=True)
    teacher = both["teacher"]
    assert (teacher["forwards"], teacher["unique_views"], teacher["replicas"]) == (200, 100, 3)
    assert (teacher["process_cpu_s"], teacher["protocol_cpu_s"]) == (0, 0)
    assert teacher["private_bytes_peak"] is None  # it is the students'
    assert both["forwards_per_unique_view"] == 2.0
    assert both["alone_cpu_s"] == pytest.approx(2 * (1 + 2))
    assert both["measured_cpu_s"] == pytest.approx(4 + 3.5)
    assert both["ideal_cpu_s"] == pytest.approx(1 + 2 * 2)
    assert (both["A"], both["A_star"]) == (pytest.approx(6 / 7.5), pytest.approx(6 / 5))
    assert both["eta_loss"] == {
        "teacher_protocol_s": 0,
        "student_protocol_s": pytest.approx({"krd.s0": 1.0, "krd.s1": 0.5}),
        "repeated_forwards_s": pytest.approx(1.0),
    }
    assert both["ideal_cpu_s"] + lost(both) == pytest.approx(both["measured_cpu_s"], rel=1e-12)
    assert both["students"]["krd.s1"]["marginal_cost"] == pytest.approx(3.5 / 2)


def test_one_student_with_the_teacher_inside_has_nothing_to_gain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    MetricsLog(run.student("a"), "a", 0).write("train", 0, 1, **train_row(0, cpu_s=3.25))
    write_stats(run, "a.0", [inside("a.0", cpu_s=1.0)])
    ledger = build_ledger(run, ["a"], taught=["a"], driver_bytes={}, on_cpu=True)
    assert ledger["A_star"] == pytest.approx(1.0)
    assert ledger["A"] == ledger["eta"] == pytest.approx(3 / 3.25)
    assert ledger["eta_loss"]["student_protocol_s"] == pytest.approx({"a": 0.25})


def test_targets_from_a_store_alone_claim_no_gain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2)
    ledger = build_ledger(run, ["a"], taught=["a"], driver_bytes={}, on_cpu=True)
    teacher = ledger["teacher"]
    assert {value for key, value in teacher.items() if key != "private_bytes_peak"} == {0}
    assert teacher["private_bytes_peak"] is None
    empty = ("forwards_per_unique_view", "cost_teacher_s_per_sample", "A", "A_star", "eta", "eta_loss")
    assert [ledger[key] for key in empty] == [None] * len(empty)
    assert ledger["students"]["a"]["marginal_cost"] == pytest.approx(1.5)


def write_memory(run: RunDir, name: str, attempt: int, private: list[int]) -> None:
    log = MetricsLog(run.student(name), name, attempt)
    for epoch, value in enumerate(private):
        log.write("train", epoch, 1, **train_row(epoch), rss_bytes=value + 1000, private_bytes=value)


def test_memory_is_the_peak_and_the_slope_after_the_first_epoch(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_memory(run, "grows", 0, [50, 100, 110, 120, 130])
    write_memory(run, "short", 0, [50, 100, 110])
    write_memory(run, "killed", 0, [900, 1])
    write_memory(run, "killed", 1, [50, 70, 70, 70])
    write_student(run, "old", epochs=5)  # rows of a version that did not measure memory
    rows = [stats_row(0, 0, private_bytes_peak=7), stats_row(0, 1, private_bytes_peak=6)]
    write_stats(run, 0, rows)
    write_stats(run, 1, [stats_row(1, 0)])
    names = ["grows", "short", "killed", "old"]
    ledger = build_ledger(run, names, taught=names, driver_bytes={}, on_cpu=True)
    found = {
        name: (entry["private_bytes_peak"], entry["private_bytes_per_epoch"])
        for name, entry in ledger["students"].items()
    }
    assert found == {
        "grows": (130, pytest.approx(10)), "short": (110, None), "killed": (900, pytest.approx(0)),
        "old": (None, None),
    }  # fmt: skip
    assert ledger["teacher"]["private_bytes_peak"] == 7


def test_repeated_epochs_count_as_trained_but_their_coverage_counts_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_student(run, "a", epochs=2, attempts=3)
    entry = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)["students"]["a"]
    assert (entry["samples"], entry["epochs"], entry["left_out"]) == (600, 2, 2)
    assert (entry["restarts"], entry["sessions"]) == (1, 2)


def test_ledger_without_teacher_or_samples_claims_no_gain(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    ledger = build_ledger(run, ["a"], taught=[], driver_bytes={}, on_cpu=True)
    assert (ledger["teacher"], ledger["A"], ledger["eta"]) == (None, None, None)
    assert ledger["cost_student_s_per_sample"] == {"a": None}
    write_stats(run, 0, [stats_row(0, 0)])
    assert build_ledger(run, ["a"], taught=["a"], driver_bytes={}, on_cpu=True)["A"] is None
