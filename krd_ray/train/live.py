"""Answers what a person sees while a run goes on: a table in a terminal, a line per epoch elsewhere.

Does not know Ray: it reads the metric rows that the workers write.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from krd_ray.train.rundir import RunDir

COLUMNS = ("student", "state", "epoch", "loss", "val many", "medium", "few", "images/s", "waiting")
FEW = 8  # with more students than this, finished and waiting ones are counted, not listed
LINES_OF_MANY = 3


class Progress:
    """Shows the run's students; call `refresh` every now and then.

    Args:
        run: the run directory.
        epochs: epochs to train, by student.
        console: where to print.
    """

    def __init__(self, run: RunDir, epochs: dict[str, int], console: Console | None = None) -> None:
        self._run, self._epochs = run, epochs
        self._console = console or Console(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._shown: list[Sequence[str]] = []
        self._printed: dict[str, int] = dict.fromkeys(epochs, -1)
        self._offsets: dict[str, _Tail] = {name: _Tail(run, name) for name in epochs}

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints one line above the table."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self, states: dict[str, str]) -> None:
        """Reads what is new and shows it."""
        shown = self._worth_showing(states)
        rows = [self._cells(name, states.get(name, "waiting")) for name in shown]
        if self._live:
            if rows == self._shown:
                return
            self._shown = rows
            table = Table(*COLUMNS, caption=self._summary(states))
            for cells in rows:
                table.add_row(*cells)
            self._live.update(table, refresh=True)
            return
        for name, cells in zip(shown, rows, strict=True):
            epoch = self._offsets[name].epoch
            every = 1 if len(self._epochs) <= FEW else -(-self._epochs[name] // LINES_OF_MANY)
            if (
                epoch // every > self._printed[name] // every
                or epoch == self._epochs[name] - 1 > self._printed[name]
            ):
                self._printed[name] = epoch
                self.say(" | ".join(f"{column} {cell}" for column, cell in zip(COLUMNS, cells, strict=True)))

    def _worth_showing(self, states: dict[str, str]) -> list[str]:
        """All students, or of many those that train and those that failed."""
        names = list(self._epochs)
        if len(names) <= FEW:
            return names
        if self._live is None:
            return [name for name in names if states.get(name) != "waiting"]
        return [name for name in names if states.get(name) in ("training", "failed")]

    def _summary(self, states: dict[str, str]) -> str | None:
        if len(self._epochs) <= FEW:
            return None
        counts = Counter(states.values())
        return ", ".join(
            f"{counts[state]} {state}" for state in ("finished", "failed", "training", "waiting")
        )

    def _cells(self, name: str, state: str) -> Sequence[str]:
        tail = self._offsets[name]
        tail.read()
        train, val = tail.train, tail.val
        if train is None:
            state = "starting" if state == "training" else state
            return (name, state, f"0/{self._epochs[name]}", *["-"] * (len(COLUMNS) - 3))
        total_s = train["compute_s"] + train["wait_targets_s"] + train["wait_data_s"]
        waiting = (train["wait_targets_s"] + train["wait_data_s"]) / total_s if total_s else 0.0
        groups = [_percent(val.get(group) if val else None) for group in ("many", "medium", "few")]
        return (
            name,
            state,
            f"{train['epoch'] + 1}/{self._epochs[name]}",
            f"{train['loss']:.3f}",
            *groups,
            f"{train['images_per_s']:,.0f}",
            f"{waiting:.0%}",
        )


class _Tail:
    """The newest rows of one student, read on from where the last call ended."""

    def __init__(self, run: RunDir, name: str) -> None:
        self._folder, self._offset = run.student(name), 0
        self.train: dict[str, Any] | None = None
        self.val: dict[str, Any] | None = None
        self.epoch = -1

    def read(self) -> None:
        rows, self._offset = self._folder.rows_after(self._offset)
        for row in rows:
            if row["split"] in ("train", "progress"):
                self.train = row
            if row["split"] == "val":
                self.val = row
            if row["split"] == "coverage":
                self.epoch = row["epoch"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
