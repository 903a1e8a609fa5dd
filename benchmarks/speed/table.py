"""Answers what the measured cells say: ratios as a table, costs as a picture.

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

from benchmarks.speed.ratios import Found, Spread, cost_of, krd_cost, plain_cost, ratios_of
from krd_ray.report.palette import INK, METHOD_COLOURS, MUTED

MEMORY_EPOCHS = 20
COLUMNS = {
    "C_T / C_i": ("cost_ratio", 1),
    "forwards per unique view": ("forwards", 3),
    "A": ("A", 2),
    "A*": ("A_star", 2),
    "eta": ("eta", 2),
    "against one process (B1)": ("against_one", 2),
    "gain over N alone (B0)": ("gain", 2),
    "marginal cost": ("marginal", 2),
    "images/s against free teacher (B2)": ("against_free", 2),
    "cores busy": ("busy", 2),
}
UNITS = {"cpu_s": "CPU seconds", "wall_s": "seconds of the card"}


def write_table(folder: Path) -> None:
    """Writes table.md and a picture per kind of cost beside the files they are made from."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    cells = {name: each for name, each in found.items() if "krd" in each}
    lines = [_line(("cell", "N", "rounds", *COLUMNS)), _line(["---"] + ["---:"] * (len(COLUMNS) + 2))]
    lines += [_line(_row(name, each)) for name, each in cells.items()]
    text = "\n".join([*lines, "", *_notes(found)])
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    for unit in UNITS:
        drawn = {name: each for name, each in cells.items() if cost_of(each) == unit and _has_plain(each)}
        _draw(drawn, unit, folder / f"{'cpu' if unit == 'cpu_s' else 'card'}_seconds.png")


def _has_plain(each: Found) -> bool:
    return plain_cost(each, "alone") is not None


def _row(name: str, found: Found) -> list[str]:
    ratios = ratios_of(found)
    cells = [_text(ratios[key], digits) for key, digits in COLUMNS.values()]
    return [name, str(found["cell"]["num_students"]), str(len(found["krd"])), *cells]


def _notes(found: dict[str, Found]) -> list[str]:
    cells = {name: each for name, each in found.items() if "krd" in each}
    notes = [
        "Medians over rounds, smallest and largest in brackets where they differ. A round is a run of krd_ray beside "
        "two measurements of the plain loops: B1, one process, one teacher, N students in a loop, no Ray; B0, N "
        "separate runs with the teacher inside. On CPUs an epoch costs CPU seconds of teacher and students, and a "
        "plain loop runs as two copies at a time, so that both cores are at work as in a run (alone, beside a run "
        "that is one process); shared: all students in one process. Cores busy: "
        "the part of their time that teacher and students took, more is better. On a GPU an epoch costs the wall "
        "seconds in which one card does all the work.",
        _besides_note(cells),
        *(_memory_of_teacher_note(name, each) for name, each in cells.items() if each["cell"]["on"] == "cpu"),
    ]
    for name, each in found.items():
        if each.get("naive_ray"):
            notes.append(_naive_note(name, each))
        if "krd" in each and plain_cost(each, "timm"):
            notes.append(_timm_note(name, each))
        if each.get("cell", {}).get("epochs", 0) >= MEMORY_EPOCHS:
            notes.append(_memory_note(name, each["krd"][0]["ledger"]))
        if "slowness" in each:
            notes.append(_slow_note(each))
    return [line for note in notes if note for line in (note, "")][:-1]


def _all_epochs(each: Found) -> list[dict[str, float]]:
    return [epoch for run in each["krd"] for epoch in run["epochs"]]


def _median(epochs: list[dict[str, float]], key: str) -> float:
    return median(epoch[key] for epoch in epochs)


def _besides_note(cells: dict[str, Found]) -> str:
    if not cells:
        return ""
    parts = []
    for name, each in cells.items():
        epochs = _all_epochs(each)
        besides = _median(epochs, "others_cpu_s")
        parts.append(f"{name} {besides:.2f} ({besides / _median(epochs, 'cpu_s'):.0%})")
    return (
        "Not in these figures, nor in the ledger: what driver, raylet, GCS, controllers and agents took besides, CPU "
        f"seconds per epoch (over those of teacher and students): {', '.join(parts)}."
    )


def _memory_of_teacher_note(name: str, each: Found) -> str:
    peaks = [run["ledger"]["teacher"]["private_bytes_peak"] for run in each["krd"]]
    known = [peak / 1e6 for peak in peaks if peak]
    return f"{name}: the teacher's process held {max(known):.0f} MB at its peak." if known else ""


def _naive_note(name: str, each: Found) -> str:
    krd, naive = _all_epochs(each), [epoch for epochs in each["naive_ray"] for epoch in epochs]
    spent, besides = _median(krd, "cpu_s"), _median(krd, "others_cpu_s")
    return (
        f"{name}: naive Ray (B4: driver loop, tensors by value, students in step, nothing kept or restarted) takes, "
        f"its driver counted, {_median(naive, 'cpu_s') / spent:.2f} times the CPU seconds of krd_ray's teacher and "
        f"students ({_median(naive, 'cpu_s') / (spent + besides):.2f} with all that krd_ray took besides) and "
        f"{_median(naive, 'wall_s') / _median(krd, 'wall_s'):.2f} times the wall time."
    )


def _timm_note(name: str, each: Found) -> str:
    timm, alone = plain_cost(each, "timm"), plain_cost(each, "alone")
    assert timm is not None
    assert alone is not None
    krd = median(krd_cost(each, k) for k in range(len(each["krd"])))
    return (
        f"{name}: timm's logit distillation task costs {timm / alone:.2f} times the plain loop (B0), "
        f"krd_ray {krd / timm:.2f} times timm's."
    )


def _slow_note(each: Found) -> str:
    return (
        f"slow student: {each['students']} students, one {each['slowness']:.1f} times slower; the others together "
        f"keep {_kept(each['against_none'])} of their images/s beside a quick one, "
        f"{_kept(each['against_slow_asks_nothing'])} of those beside a slow one that asks for nothing."
    )


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
    one = f"median student {ratios['median']:.2f}, slowest of them {ratios['slowest']:.2f}"
    return f"{ratios['together']:.2f} ({one})"


def _draw(cells: dict[str, Found], unit: str, path: Path) -> None:
    """Bars of an epoch's cost, contender by contender, over that of N runs alone."""
    if not cells:
        return
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.8 * len(cells)), layout="constrained")
    for place, each in enumerate(cells.values()):
        ratios = ratios_of(each)
        gain, against = ratios["gain"], ratios["against_one"]
        assert gain is not None
        assert against is not None
        bars = [1.0, 1 / gain.median / against.median, 1 / gain.median]
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
    axes.set_xlabel(f"{UNITS[unit]} per epoch, over N runs with the teacher inside each")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _text(value: Spread | None, digits: int) -> str:
    if value is None:
        return "-"
    middle, least, most = (f"{each:.{digits}f}" for each in value)
    return middle if least == most else f"{middle} ({least}-{most})"


def _line(parts: Any) -> str:
    return "| " + " | ".join(parts) + " |"
