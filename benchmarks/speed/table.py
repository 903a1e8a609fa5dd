"""Answers what the measured cells say: ratios as a table, CPU seconds as a picture.

Does not measure; it reads the JSON files of one folder. Losing rows stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from krd_ray.report.palette import INK, METHOD_COLOURS, MUTED

Found = dict[str, Any]
MEMORY_EPOCHS = 20
HEAD = (
    "cell", "N", "C_T / C_i", "forwards per unique view", "A", "A*", "eta", "against one process (B1)",
    "gain over N alone (B0)", "marginal cost", "images/s against free teacher (B2)",
)  # fmt: skip


def write_table(folder: Path) -> None:
    """Writes table.md and cpu_seconds.png beside the files they are made from."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    cells = {name: each for name, each in found.items() if "krd" in each}
    lines = [_line(HEAD), _line(["---"] + ["---:"] * (len(HEAD) - 1))]
    lines += [_line(_row(name, each)) for name, each in cells.items()]
    text = "\n".join([*lines, "", *_notes(found)])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    _draw(
        {name: each for name, each in cells.items() if each["plain"].get("alone")}, folder / "cpu_seconds.png"
    )


def cpu_s(epochs: list[dict[str, float]] | None) -> float | None:
    """Median CPU seconds of an epoch; None without one."""
    return _spent(epochs) if epochs else None


def _row(name: str, found: Found) -> list[str]:
    ledger, num, plain = found["krd"]["ledger"], found["cell"]["num_students"], found["plain"]
    krd = cpu_s(found["krd"]["epochs"])
    alone, one = cpu_s(plain.get("alone")), cpu_s(plain.get("one_process"))
    costs = list(ledger["cost_student_s_per_sample"].values())
    cost = ledger["cost_teacher_s_per_sample"]
    marginal = [each["marginal_cost"] for each in ledger["students"].values()]
    inside = found["cell"]["placement"] == "in_process"
    return [
        name,
        str(num),
        _text(cost / median(costs) if cost else None, 1),
        _text(ledger["forwards_per_unique_view"], 3),
        _text(ledger["A"]),
        _text(ledger["A_star"]),
        _text(ledger["eta"]),
        _text(krd / one if krd and one else None),
        _text(num * alone / krd if krd and alone else None),
        _text(None if inside or None in marginal else median(marginal)),
        _text(_against_free(found)),
    ]


def _against_free(found: Found) -> float | None:
    """Images/s of the students over those of as many in one process whose targets lie in memory."""
    free = found["plain"].get("free")
    if not free:
        return None
    ledger = found["krd"]["ledger"]["students"].values()
    images = median(each["samples"] / each["epochs"] for each in ledger)
    return median(found["krd"]["images_per_s"].values()) / (
        images / median(epoch["wall_s"] for epoch in free)
    )


def _notes(found: dict[str, Found]) -> list[str]:
    notes = [
        "CPU seconds per epoch, medians over the epochs after the first. B1: one process, one teacher, N students in "
        "a loop, no Ray; B0: N separate runs with the teacher inside. Both ran as two copies at a time, before and "
        "after the run, so that both cores were as busy as in the run.",
        _besides_note(found),
    ]
    for name, each in found.items():
        if each.get("naive_ray"):
            notes.append(_naive_note(name, each))
        if each.get("plain", {}).get("timm"):
            notes.append(_timm_note(name, each))
        if each.get("cell", {}).get("epochs", 0) >= MEMORY_EPOCHS:
            notes.append(_memory_note(name, each["krd"]["ledger"]))
        if "slowness" in each:
            notes.append(_slow_note(each))
    return [line for note in notes for line in (note, "")][:-1]


def _besides(each: Found) -> float:
    return median(epoch["others_cpu_s"] for epoch in each["krd"]["epochs"])


def _besides_note(found: dict[str, Found]) -> str:
    parts = [
        f"{name} {_besides(each):.2f} ({_besides(each) / _spent(each['krd']['epochs']):.0%})"
        for name, each in found.items()
        if "krd" in each
    ]
    return (
        "Not in these figures, nor in the ledger: what driver, raylet, GCS, controllers and agents took besides, CPU "
        f"seconds per epoch (over those of teacher and students): {', '.join(parts)}."
    )


def _naive_note(name: str, each: Found) -> str:
    krd, naive = each["krd"]["epochs"], each["naive_ray"]
    wall = median(epoch["wall_s"] for epoch in naive) / median(epoch["wall_s"] for epoch in krd)
    return (
        f"{name}: naive Ray (B4: driver loop, tensors by value, students in step, nothing kept or restarted) takes, "
        f"its driver counted, {_spent(naive) / _spent(krd):.2f} times the CPU seconds of krd_ray's teacher and "
        f"students ({_spent(naive) / (_spent(krd) + _besides(each)):.2f} with all that krd_ray took besides) and "
        f"{wall:.2f} times the wall time."
    )


def _timm_note(name: str, each: Found) -> str:
    timm = _spent(each["plain"]["timm"])
    return (
        f"{name}: timm's logit distillation task takes {timm / _spent(each['plain']['alone']):.2f} times the CPU "
        f"seconds of the plain loop (B0), krd_ray {_spent(each['krd']['epochs']) / timm:.2f} times timm's."
    )


def _slow_note(each: Found) -> str:
    return (
        f"slow student: {each['students']} students, one {each['slowness']:.1f} times slower; the others keep "
        f"{_kept(each['against_none'])} of their images/s beside a quick one, "
        f"{_kept(each['against_slow_asks_nothing'])} of those beside a slow one that asks for nothing."
    )


def _spent(epochs: list[dict[str, float]]) -> float:
    return median(epoch["cpu_s"] for epoch in epochs)


def _memory_note(name: str, ledger: dict[str, Any]) -> str:
    students = ledger["students"].values()
    slope = max(each["private_bytes_per_epoch"] for each in students) / 1e6
    peak = max(each["private_bytes_peak"] for each in students) / 1e6
    teacher = ledger["teacher"]
    return (
        f"{name}: memory of the largest student worker grows by {slope:.2f} MB an epoch (least squares over "
        f"{next(iter(students))['epochs'] - 1} epochs) with a peak of {peak:.0f} MB; the teacher's process holds "
        f"{teacher['private_bytes_peak'] / 1e6:.0f} MB at its peak, {teacher['store_memory_bytes'] / 1e6:.0f} MB of "
        "them the target store."
    )


def _kept(ratios: dict[str, float]) -> str:
    return f"{ratios['median']:.2f} (median student; the worst {ratios['worst']:.2f})"


def _draw(cells: dict[str, Found], path: Path) -> None:
    """Bars of CPU seconds per epoch, contender by contender, over those of N runs alone."""
    if not cells:
        return
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.8 * len(cells)), layout="constrained")
    for place, each in enumerate(cells.values()):
        alone = each["cell"]["num_students"] * (cpu_s(each["plain"]["alone"]) or 0.0)
        bars = [
            1.0,
            (cpu_s(each["plain"]["one_process"]) or 0.0) / alone,
            (cpu_s(each["krd"]["epochs"]) or 0.0) / alone,
        ]
        labels = ["N alone (B0)", "one process (B1)", "krd_ray"]
        for k, (value, label) in enumerate(zip(bars, labels, strict=True)):
            colour = (MUTED, METHOD_COLOURS[4], METHOD_COLOURS[0])[k]
            axes.barh(place + 0.26 * (k - 1), value, 0.24, color=colour, label=label if place == 0 else None)
            axes.text(
                value + 0.01, place + 0.26 * (k - 1), f"{value:.2f}", va="center", fontsize=8, color=INK
            )
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("CPU seconds per epoch, over N runs with the teacher inside each")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(parts: Any) -> str:
    return "| " + " | ".join(parts) + " |"
