"""Answers what sharing the teacher saved, what it could have saved at most, and where the difference went.

Does not read anything: it is given the entries of the ledger, and every figure in them was counted by a CPU clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_KNOWN: dict[str, Any] = dict.fromkeys(
    ("alone_cpu_s", "measured_cpu_s", "ideal_cpu_s", "A", "A_star", "eta", "eta_loss")
)


def bound_of(teacher: Mapping[str, Any], taught: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compares a run with N runs that have the teacher inside, and with the least that its work can cost.

        C_T = T / forwards,   C_i = step_i / samples_i
        alone    = sum_i samples_i * (C_T + C_i)       N runs with the teacher inside each
        ideal    = views * C_T + sum_i step_i          each unique view forwarded once, each step made, nothing else
        measured = P + sum_i S_i                       what the processes took while training
        A = alone / measured,   A* = alone / ideal,   eta = A / A* = ideal / measured

    T are the CPU seconds of all forwards, step_i those of student i's steps, P those of the teacher's processes and
    S_i those of student i's. With N students of as many samples and fresh views,
    A* = (N * C_T + sum C_i) / (C_T + sum C_i). What eta lacks to 1 is accounted for without a rest:

        measured - ideal = (P - T_P) + sum_i (S_i - step_i - T_i) + (forwards - views) * C_T

    T_i is the part of T that ran inside student i's own processes (`teacher.placement: in_process`), T_P the rest.
    A process with several torch threads is timed as a whole, so that what it does besides during a forward or a
    step counts as part of it.

    Args:
        teacher: its entry of the ledger, with forwards > 0.
        taught: entries of the students that learn from it, each with samples > 0.
    Returns:
        Entries of the ledger; `eta_loss` holds the three terms above, in CPU seconds: `teacher_protocol_s`,
        `student_protocol_s` by student, `repeated_forwards_s`. Ratios are at most A* and 1 but for the clocks' noise.

    Example:
        >>> teacher = {"forwards": 100, "unique_views": 100, "cpu_s": 4.0}
        >>> teacher |= {"process_cpu_s": 4.5, "protocol_cpu_s": 0.5}
        >>> student = {"samples": 100, "step_cpu_s": 1.0, "cpu_s": 1.25, "teacher_cpu_s": 0.0}
        >>> found = bound_of(teacher, {"a": student, "b": student})
        >>> found["alone_cpu_s"], found["measured_cpu_s"], found["ideal_cpu_s"]
        (10.0, 7.0, 6.0)
        >>> found["eta_loss"]
        {'teacher_protocol_s': 0.5, 'student_protocol_s': {'a': 0.25, 'b': 0.25}, 'repeated_forwards_s': 0.0}
    """
    cost = teacher["cpu_s"] / teacher["forwards"]
    steps = sum(entry["step_cpu_s"] for entry in taught.values())
    alone = sum(entry["samples"] for entry in taught.values()) * cost + steps
    ideal = teacher["unique_views"] * cost + steps
    measured = teacher["process_cpu_s"] + sum(entry["cpu_s"] for entry in taught.values())
    return {
        "cost_teacher_s_per_sample": cost,
        "alone_cpu_s": alone,
        "measured_cpu_s": measured,
        "ideal_cpu_s": ideal,
        "A": alone / measured,
        "A_star": alone / ideal,
        "eta": ideal / measured,
        "eta_loss": {
            "teacher_protocol_s": teacher["protocol_cpu_s"],
            "student_protocol_s": {
                name: entry["cpu_s"] - entry["step_cpu_s"] - entry["teacher_cpu_s"]
                for name, entry in taught.items()
            },
            "repeated_forwards_s": (teacher["forwards"] - teacher["unique_views"]) * cost,
        },
    }
