"""Answers whether the speed benchmark's ratios are what their formulas say, on figures made up here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.speed.__main__ import main
from benchmarks.speed.cells import Cell
from benchmarks.speed.ratios import Spread, ratios_of
from benchmarks.speed.slow import compare


def epochs(*cost: float) -> list[dict[str, float]]:
    return [{"cpu_s": each, "wall_s": 10 * each} for each in cost]


def run(cost: float, *, pace: float = 50.0, eta: float = 0.9) -> dict[str, Any]:
    student = {"samples": 300, "epochs": 3, "marginal_cost": 1.25}
    return {
        "epochs": epochs(cost, cost, cost + 3),
        "images_per_s": {"student0": pace, "student1": pace},
        "ledger": {
            "students": {"student0": student, "student1": student},
            "forwards_per_unique_view": 1.0,
            "A": 1.5,
            "A_star": 1.6,
            "eta": eta,
            "cost_teacher_s_per_sample": 4.0,
            "cost_student_s_per_sample": {"student0": 1.0, "student1": 1.0},
        },
    }


def found(cell: Cell, krd: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    return {"cell": asdict(cell), "krd": krd, "plain": plain, "naive_ray": []}


def test_a_round_is_compared_with_the_plain_loops_on_both_sides_of_it() -> None:
    plain = [{"alone": epochs(4.0), "one_process": epochs(value)} for value in (6.0, 8.0, 10.0)]
    ratios = ratios_of(found(Cell("t", "s", 2), [run(6.0), run(8.0, eta=0.8)], plain))
    assert ratios["against_one"] == Spread(
        1.0, 1.0, 1.0
    )  # 7 over the mean of 6 and 8; 9 over that of 8 and 10
    assert ratios["gain"] == pytest.approx((2 * 4 * (1 / 7 + 1 / 9) / 2, 8 / 9, 8 / 7))
    assert ratios["eta"] == pytest.approx((0.85, 0.8, 0.9))
    assert ratios["cost_ratio"] == Spread(4.0, 4.0, 4.0)
    assert ratios["marginal"] == Spread(1.25, 1.25, 1.25)
    assert ratios["against_free"] is None
    assert ratios["busy"] == pytest.approx((0.05, 0.05, 0.05))  # of two cores, 10 wall seconds per CPU second


def test_on_a_card_the_limit_is_the_one_process_and_the_median_student_sets_the_pace() -> None:
    plain = [{"alone": epochs(0.05), "one_process": epochs(0.06)}]  # 0.5 and 0.6 s of the card
    ratios = ratios_of(found(Cell("t", "s", 2, on="gpu"), [run(1.0, pace=125.0)], plain))  # 100 images: 0.8 s
    assert ratios["against_one"] == pytest.approx((0.8 / 0.6,) * 3)
    assert ratios["A_star"] == pytest.approx((2 * 0.5 / 0.6,) * 3)
    assert ratios["A"] == ratios["gain"] == pytest.approx((2 * 0.5 / 0.8,) * 3)
    assert ratios["eta"] == pytest.approx((0.6 / 0.8,) * 3)
    assert ratios["cost_ratio"] == pytest.approx((4.0,) * 3)  # a student costs 0.1, the teacher 0.4


def test_a_filled_store_is_compared_by_images_per_second() -> None:
    plain = [{"free": epochs(0.2)}, {"free": epochs(0.3)}]  # 100 images in 2.5 s of wall time
    ratios = ratios_of(found(Cell("t", "s", 2, placement="stored", cycle=2), [run(1.0, pace=50.0)], plain))
    assert ratios["against_free"] == pytest.approx((50.0 / 40.0,) * 3)
    assert ratios["against_one"] is ratios["gain"] is None


def test_a_machine_that_no_row_is_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="--on must be one of cpu, gpu, got 'tpu'"):
        main(on="tpu", results=tmp_path)


def test_students_beside_a_slow_one_are_compared_place_by_place() -> None:
    before = [[100.0, 200.0, 300.0], [300.0, 100.0, 200.0], [1.0, 2.0, 3.0]]  # the third run was disturbed
    now = [[90.0, 330.0, 200.0], [200.0, 90.0, 330.0], [200.0, 330.0, 90.0]]  # by name the worst would be 0.3
    expected = {"together": 620 / 600, "median": 1.0, "slowest": 0.9, "worst": 0.9}
    assert compare(now, before) == pytest.approx(expected)
