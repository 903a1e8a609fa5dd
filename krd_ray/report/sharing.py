"""Answers what sharing the teacher cost, where eta was lost and who holds how much memory, as the ledger has it.

Does not draw, and computes no ratio anew. Ledgers of earlier versions lack some of it: `None` or no row, then.
"""

from __future__ import annotations

from typing import Any

from krd_ray.report.formats import byte_size, number, percent
from krd_ray.report.read_run import Row, Run

LOSSES = {
    "teacher_protocol_s": "the teacher outside its forwards",
    "student_protocol_s": "the students outside their steps",
    "repeated_forwards_s": "forwards of views already answered",
}


def sharing_rows(run: Run) -> list[Row]:
    """CPU seconds of N runs alone, of this run and of the ideal: one row a part with `bar, part, student, cpu_s`.

    `bar` is `alone`, `run` or `ideal`; `part` is `forwards`, `steps`, `repeated_forwards`, `teacher_protocol` or
    `student_protocol`; rows of steps name their student. The parts of a bar add up to the ledger's `alone_cpu_s`,
    `measured_cpu_s` or `ideal_cpu_s`.
    """
    ledger = run.ledger or {}
    loss = ledger.get("eta_loss")
    if loss is None:
        return []
    taught = loss["student_protocol_s"]
    own = {name: ledger["students"].get(name, {}) for name in taught}
    cost = ledger["cost_teacher_s_per_sample"]
    num_samples = sum(entry.get("samples") or 0 for entry in own.values())
    steps = [("steps", name, entry.get("step_cpu_s") or 0.0) for name, entry in own.items()]
    least = [("forwards", None, ledger["teacher"]["unique_views"] * cost), *steps]
    bars: dict[str, list[tuple[str, str | None, float]]] = {
        "alone": [("forwards", None, num_samples * cost), *steps],
        "run": [
            *least,
            ("repeated_forwards", None, loss["repeated_forwards_s"]),
            ("teacher_protocol", None, loss["teacher_protocol_s"]),
            ("student_protocol", None, sum(taught.values())),
        ],
        "ideal": least,
    }
    return [
        {"bar": bar, "part": part, "student": student, "cpu_s": cpu_s}
        for bar, parts in bars.items()
        for part, student, cpu_s in parts
    ]


def losses(ledger: Row) -> list[tuple[str, float]]:
    """Where eta was lost, largest first: (in words, what it takes off eta); nothing where it is not known.

        eta = ideal / measured = 1 - sum of the parts / measured

    Example:
        >>> loss = {"teacher_protocol_s": 1.0, "student_protocol_s": {"a": 1.0, "b": 2.0}, "repeated_forwards_s": 0.0}
        >>> losses({"eta_loss": loss, "measured_cpu_s": 20.0})[0]
        ('the students outside their steps', 0.15)
    """
    loss = ledger.get("eta_loss")
    if loss is None:
        return []
    seconds = {**loss, "student_protocol_s": sum(loss["student_protocol_s"].values())}
    parts = [(words, seconds[key] / ledger["measured_cpu_s"]) for key, words in LOSSES.items()]
    return sorted(parts, key=lambda part: -part[1])


def bound_caption(run: Run) -> str:
    """What the picture of the bound shows of this run, in one or two sentences.

    Example:
        >>> from pathlib import Path
        >>> loss = {"teacher_protocol_s": 1.0, "student_protocol_s": {"a": 0.0}, "repeated_forwards_s": 0.0}
        >>> ledger = {"A": 1.8, "A_star": 2.0, "eta": 0.9, "eta_loss": loss, "measured_cpu_s": 10.0}
        >>> bound_caption(Run(Path(), {}, "", {}, None, [], None, ledger))
        ' A 1.80 of at most A* 2.00: η = A / A* = 0.900. Lost to the teacher outside its forwards: 10.0 %.'
    """
    ledger = run.ledger or {}
    if ledger.get("eta_loss") is None:
        return ""
    lost = [f"{words}: {percent(share)} %" for words, share in losses(ledger) if share >= 0.0005]
    return (
        f" A {number(ledger['A'], 2)} of at most A* {number(ledger['A_star'], 2)}: "
        f"η = A / A* = {number(ledger['eta'], 3)}." + (f" Lost to {', '.join(lost)}." if lost else "")
    )


def why_no_bound(run: Run) -> str:
    """Say, for the reader, why a run has no picture of the bound."""
    if run.ledger is None:
        return "No ledger yet: ledger.json is written when the run has ended."
    teacher = run.ledger["teacher"]
    if teacher is None:
        return "No teacher in this run (teacher: null), so there was nothing to share."
    if not teacher.get("forwards"):
        return "The teacher made no forward in this run: all targets came from a store that was full before."
    if run.ledger.get("A") is None:
        return "Not known: CPU clocks say nothing about work on GPUs, or a student of this run has trained nothing."
    return "The ledger was written by an earlier version, which did not record where eta was lost."


def largest_student(ledger: Row) -> tuple[str, Row] | None:
    """The student whose largest process holds most memory of its own: its name and its entry.

    Example:
        >>> sizes = {"small": {"private_bytes_peak": 1}, "large": {"private_bytes_peak": 2}, "old": {}}
        >>> largest_student({"students": sizes})
        ('large', {'private_bytes_peak': 2})
    """
    known = [
        (name, entry)
        for name, entry in ledger["students"].items()
        if entry.get("private_bytes_peak") is not None
    ]
    return max(known, key=lambda item: item[1]["private_bytes_peak"], default=None)


def dearest_student(ledger: Row) -> tuple[str, float] | None:
    """The taught student whose process costs most beside its steps: its name and its marginal cost."""
    taught = (ledger.get("eta_loss") or {}).get("student_protocol_s") or {}
    costs = {name: ledger["students"].get(name, {}).get("marginal_cost") for name in taught}
    known = [(name, cost) for name, cost in costs.items() if cost is not None]
    return max(known, key=lambda item: item[1], default=None)


def growth(bytes_per_epoch: float | None) -> str:
    """Write a slope of memory with its sign.

    Example:
        >>> growth(1536.0), growth(-3 * 2**20), growth(None)
        ('+1.5 KiB an epoch', '-3.0 MiB an epoch', 'growth not known: fewer than 4 epochs')
    """
    if bytes_per_epoch is None:
        return "growth not known: fewer than 4 epochs"
    return f"{'-' if bytes_per_epoch < 0 else '+'}{byte_size(abs(bytes_per_epoch))} an epoch"


def memory_sentence(ledger: dict[str, Any]) -> str:
    """Memory of the teacher and of the largest student in one clause; empty where none was recorded.

    Example:
        >>> student = {"private_bytes_peak": 2**29, "private_bytes_per_epoch": None}
        >>> memory_sentence({"teacher": {"private_bytes_peak": 2**30}, "students": {"a": student}})
        'memory: teacher 1.0 GiB, largest student a 512.0 MiB'
    """
    teacher, student = (ledger["teacher"] or {}).get("private_bytes_peak"), largest_student(ledger)
    parts = [f"teacher {byte_size(teacher)}"] if teacher is not None else []
    if student is not None:
        name, entry = student
        parts.append(f"largest student {name} {byte_size(entry['private_bytes_peak'])}")
    return f"memory: {', '.join(parts)}" if parts else ""
