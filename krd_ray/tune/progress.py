"""Answers what a person sees while a search goes on: a line per ended trial, and in a terminal a table of what runs.

Does not know Ray: it reads the study and the rows that trials write.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.live import Live
from rich.table import Table

from krd_ray.tune import study as names
from krd_ray.tune.outcome import STATES
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.space import PREFIX, Space
from krd_ray.tune.study import best_trials, ended_trials

SHOWN = ("top1", "many", "medium", "few")


class SearchProgress:
    """Shows a search; call `refresh` every now and then, `ended` when a trial has ended, from any thread.

    Args:
        folder: of the search.
        options: how many trials, how long.
        space: with its metrics.
        console: where to print.
    """

    def __init__(
        self, folder: SearchDir, options: SearchOptions, space: Space, console: Console | None = None
    ) -> None:
        self._folder, self._options, self._space = folder, options, space
        self._console = console or Console(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._offsets = dict.fromkeys(self._folders(), 0)  # trials of an earlier session have ended
        self._running: dict[str, dict[str, Any]] = {}
        self._caption = ""
        self._lock = threading.Lock()  # trials end in Ray Tune's thread, the driver's own refreshes

    def __enter__(self) -> SearchProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints one line above the table."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def ended(self, study: optuna.Study, number: int) -> None:
        """Prints how a trial ended, and the best so far."""
        trial = next(each for each in study.get_trials(deepcopy=False) if each.number == number)
        done = ended_trials(study)
        with self._lock:
            self._running.pop(str(number), None)
            self._offsets.setdefault(str(number), 0)  # one that ended before the table saw it never enters it
            self._caption = f"{len(done)}/{self._options.trials} ended, best {_best(study, self._space)}"
        self.say(
            f"{len(done)}/{self._options.trials} {trial_line(trial, self._space)} | best {_best(study, self._space)}"
        )

    def refresh(self) -> None:
        """Reads what is new of the running trials and shows it, in a terminal."""
        if self._live is None:
            return
        with self._lock:
            self._read()
            table = self._table()
        self._live.update(table, refresh=True)

    def _table(self) -> Table:
        table = Table(
            "trial", "epoch", "loss", *(f"{PREFIX}{name}" for name in SHOWN), caption=self._caption or None
        )
        for name, seen in sorted(self._running.items(), key=lambda item: int(item[0])):
            loss = "-" if seen.get("loss") is None else f"{seen['loss']:.3f}"
            figures = ("-" if seen.get(key) is None else f"{seen[key]:.1%}" for key in SHOWN)
            table.add_row(name, f"{seen.get('epoch', 0)}/{self._options.epochs}", loss, *figures)
        return table

    def _folders(self) -> list[str]:
        return [path.name for path in (self._folder.root / self._folder.run.members).iterdir()]

    def _read(self) -> None:
        for name in self._folders():
            if name not in self._running and name in self._offsets:
                continue
            rows, self._offsets[name] = self._folder.run.student(name).rows_after(self._offsets.get(name, 0))
            seen = self._running.setdefault(name, {})
            for row in rows:
                if row["split"] in ("train", "progress"):
                    seen["loss"] = row["loss"]
                if row["split"] == "val":
                    seen.update({key: row.get(key) for key in SHOWN})
                if row["split"] == "coverage":
                    seen["epoch"] = row["epoch"] + 1


def trial_line(trial: FrozenTrial, space: Space) -> str:
    """How a trial ended, in one line.

    Args:
        trial: of the study, ended.
        space: with its metrics.
    """
    attributes = trial.user_attrs
    kind = " (the config as it stands)" if attributes.get(names.BASELINE) else ""
    figures = attributes.get(names.FIGURES, {})
    reached = ", ".join(f"{metric} {_number(figures.get(metric))}" for metric in space.metrics)
    settings = attributes.get(names.SETTINGS, trial.params)
    drawn = ", ".join(f"{name}={_number(value)}" for name, value in settings.items())
    words = [
        f"trial {trial.number}{kind}: {STATES[trial.state]} after {attributes.get(names.EPOCHS, 0)} epoch(s)",
        reached,
        drawn,
        str(attributes[names.ERROR]).splitlines()[0] if attributes.get(names.ERROR) else "",
    ]
    return " | ".join(word for word in words if word)


def _best(study: optuna.Study, space: Space) -> str:
    front = best_trials(study)
    if not front:
        return "none yet"
    shown = [
        f"{'/'.join(_number(value) for value in trial.values)} (trial {trial.number})" for trial in front[:3]
    ]
    more = f" and {len(front) - 3} more" if len(front) > 3 else ""
    return f"{', '.join(space.metrics)} {', '.join(shown)}{more}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
