"""Answers what all faults that were tried have come to, as a text table of the JSON files of one folder.

Does not judge: what was kept stands in the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.registry import FAULTS

HEAD = (
    "fault", "what", "promised", "kept", "samples lost", "doubled", "restarts", "epochs again", "recovery, s",
    "forwards per unique view", "weights", "metrics", "broken",
)  # fmt: skip
NOTES = (
    "Each repetition strikes at another epoch and a random moment of it. Lost and doubled: samples of completed "
    "epochs, by the ids of the batches that were trained, along the line of epochs that the final weights descend "
    "from. Epochs again: completed, then done again from an older checkpoint. Weights and metrics (of the last "
    "validation): against an unfaulted run at the same seed; equal means every bit.",
    "Recovery, s: until a restarted teacher has answered, a restarted student has trained an epoch, a student has "
    "trained an epoch after its pause, `--resume` has trained an epoch from its start on, or a run that stops has "
    "ended. One machine, Ray's processes started anew for each repetition.",
)
Row = dict[str, Any]


def write_table(folder: Path) -> str:
    """Writes table.md beside the files it is made from and returns it."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(row_of(name, found[name]["repetitions"])) for name in FAULTS if name in found]
    if "atomic" in found:
        each = found["atomic"]
        lines += [
            "",
            f"Saving: {each['kills']} processes killed at random moments, {each['in_the_middle']} of them in the "
            f"middle of a file, {each['unreadable']} unreadable afterwards.",
        ]
    text = "\n".join([*lines, *(line for note in NOTES for line in ("", note))]) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def row_of(name: str, repetitions: Sequence[Row]) -> list[str]:
    """One fault's cells, all repetitions together."""
    students = [each for found in repetitions for each in found.get("students", {}).values()]
    seconds = sorted(found["recover_s"] for found in repetitions if found.get("recover_s") is not None)
    broken = {part for found in repetitions for part, kept in found.get("checks", {}).items() if not kept}
    broken |= {"error" for found in repetitions if "error" in found}
    forwards = [each for found in repetitions if (each := found.get("forwards_per_unique_view")) is not None]
    restarts = [sum(found.get("restarts", {}).values()) for found in repetitions]
    return [
        name,
        FAULTS[name].what,
        FAULTS[name].promise,
        f"{sum(found['kept'] for found in repetitions)} of {len(repetitions)}",
        str(sum(each["lost"] for each in students)),
        str(sum(each["doubled"] for each in students)),
        _span(restarts),
        _span([each["epochs_again"] for each in students]),
        f"{seconds[0]:.1f} to {seconds[-1]:.1f}" if seconds else "-",
        f"{max(forwards):.3f}" if forwards else "-",
        _equal([each["differs"]["weights"] for each in students]),
        _equal([each["differs"]["metrics"] for each in students]),
        ", ".join(sorted(broken)) or "-",
    ]


def _span(values: Sequence[int]) -> str:
    if not values:
        return "-"
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _equal(differences: Sequence[float]) -> str:
    if not differences:
        return "-"
    return "equal" if max(differences) == 0 else f"differ by {max(differences):.1e}"


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"
