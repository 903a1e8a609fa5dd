"""Answers which ratios the rounds of one measured cell give: medians over rounds, with smallest and largest.

Does not read files and does not format.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.speed.cells import MACHINES

Found = dict[str, Any]


class Spread(NamedTuple):
    """A ratio in the median round, in the round where it is least, and where it is largest."""

    median: float
    least: float
    most: float


def ratios_of(found: Found) -> dict[str, Spread | None]:
    """All ratios of a cell by name; None where the cell does not have it.

    With K the cost of an epoch of the run, P_1 and P_N that of the plain loop with the teacher inside and one or N
    students, each the mean of what was measured before and after the run of that round:

        against_one = K / P_N        gain = N P_1 / K        against_free = images/s of the run / images/s of B2

    `busy` is the part of the cores' time that teacher and students took (CPU only).

    On a CPU A, A* and eta are the ledger's. On a card, where all processes take turns, the limit is the one process:
    A = gain, A* = N P_1 / P_N, eta = P_N / K; what a student costs is (P_N - P_1) / (N - 1), the teacher the rest
    of P_1, its views with it.
    """
    num, rounds = found["cell"]["num_students"], range(len(found["krd"]))

    def over(each: Callable[[int], float | None]) -> Spread | None:
        values = [value for value in map(each, rounds) if value is not None]
        return Spread(median(values), min(values), max(values)) if values else None

    def ledger(key: str) -> Callable[[int], float | None]:
        return lambda k: found["krd"][k]["ledger"][key]

    found_ratios = {
        "forwards": over(ledger("forwards_per_unique_view")),
        "cost_ratio": over(lambda k: _cost_ratio(found, k)),
        "A": over(ledger("A")),
        "A_star": over(ledger("A_star")),
        "eta": over(ledger("eta")),
        "against_one": over(lambda k: _over(krd_cost(found, k), _plain(found, "one_process", k))),
        "gain": over(lambda k: _over(_times(num, _plain(found, "alone", k)), krd_cost(found, k))),
        "marginal": over(lambda k: _marginal(found, k)),
        "against_free": over(lambda k: _against_free(found, k)),
        "busy": over(lambda k: _busy(found, k)),
    }
    if cost_of(found) == "wall_s":
        found_ratios |= {
            "A": found_ratios["gain"],
            "A_star": over(
                lambda k: _over(_times(num, _plain(found, "alone", k)), _plain(found, "one_process", k))
            ),
            "eta": over(lambda k: _over(_plain(found, "one_process", k), krd_cost(found, k))),
        }
    return found_ratios


def krd_cost(found: Found, number: int) -> float:
    """Cost of an epoch of one run: the mean, as a teacher may rest in some.

    On a card it is the wall time of an epoch of the median student: students start seconds apart, which is epochs
    there, and one that starts late is quick until it has caught up, so that the end of everybody's epoch says little.
    """
    run = found["krd"][number]
    if cost_of(found) == "wall_s":
        return _images(run) / median(run["images_per_s"].values())
    return fmean(epoch["cpu_s"] for epoch in run["epochs"])


def _busy(found: Found, number: int) -> float | None:
    if cost_of(found) == "wall_s":
        return None
    num_cpus = MACHINES[found["cell"]["on"]].num_cpus
    epochs = found["krd"][number]["epochs"]
    return sum(e["cpu_s"] for e in epochs) / (num_cpus * sum(e["wall_s"] for e in epochs))


def _images(run: Found) -> float:
    """Images of an epoch."""
    return median(each["samples"] / each["epochs"] for each in run["ledger"]["students"].values())


def cost_of(found: Found) -> str:
    """What an epoch costs on the cell's machine: `cpu_s` or `wall_s`."""
    return MACHINES[found["cell"]["on"]].cost


def _plain(found: Found, contender: str, number: int) -> float | None:
    """Cost of an epoch, the mean of the medians before and after a run."""
    beside = found["plain"][number : number + 2] or found["plain"][-1:]
    if not all(contender in each for each in beside):
        return None
    return sum(median(epoch[cost_of(found)] for epoch in each[contender]) for each in beside) / len(beside)


def plain_cost(found: Found, contender: str) -> float | None:
    """Median cost of an epoch over all measurements of a plain contender."""
    epochs = [epoch[cost_of(found)] for each in found["plain"] for epoch in each.get(contender, [])]
    return median(epochs) if epochs else None


def _cost_ratio(found: Found, number: int) -> float | None:
    if cost_of(found) == "wall_s":
        alone, one = _plain(found, "alone", number), _plain(found, "one_process", number)
        num = found["cell"]["num_students"]
        student = (one - alone) / (num - 1) if alone and one and num > 1 else None
        return (alone - student) / student if alone and student else None
    ledger = found["krd"][number]["ledger"]
    cost = ledger["cost_teacher_s_per_sample"]
    return cost / median(ledger["cost_student_s_per_sample"].values()) if cost else None


def _marginal(found: Found, number: int) -> float | None:
    if found["cell"]["placement"] == "in_process":  # the teacher's seconds are among the student's
        return None
    students = found["krd"][number]["ledger"]["students"].values()
    costs = [each["marginal_cost"] for each in students]
    return None if None in costs else median(costs)


def _against_free(found: Found, number: int) -> float | None:
    """Images/s of the students over those of as many in one process whose targets lie in memory."""
    beside = [
        epoch["wall_s"] for each in found["plain"][number : number + 2] for epoch in each.get("free", [])
    ]
    if not beside:
        return None
    run = found["krd"][number]
    return median(run["images_per_s"].values()) / (_images(run) / (sum(beside) / len(beside)))


def _over(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base is not None else None


def _times(factor: int, value: float | None) -> float | None:
    return None if value is None else factor * value
