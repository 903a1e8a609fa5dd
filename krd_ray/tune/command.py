"""Answers what `krd tune` does with its words: a new search or a resumed one, and what is printed at the end.

Does not search (`search`) and does not read YAML or spaces itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from krd_ray.config_io import load_config
from krd_ray.errors import ConfigError, RunError
from krd_ray.report.read_search import read_search
from krd_ray.report.search_page import confirmed
from krd_ray.report.search_text import print_search_table
from krd_ray.report.terminal import new_console
from krd_ray.tune.search import Search, new_search, resumed_search
from krd_ray.tune.search_dir import SearchDir, SearchOptions

NUM_TRIALS = 40


def open_search(
    config: Path | None,
    space: Path | None,
    options: SearchOptions,
    settings: Sequence[str],
    *,
    student: str | None,
    resume: Path | None,
    say: Callable[[str], None],
) -> Search:
    """Checks and opens the search that a person asked for.

    Args:
        config, space: files of a new search; None with `resume`.
        options: as asked for; `trials` 0: 40, or with `resume` as many as before.
        settings: `a.b=c` texts laid over the config.
        student: which of several.
        resume: folder of a search that goes on.
        say: gets lines for people.
    Raises:
        KrdError: words that do not go together, or anything that keeps the search from starting.
    """
    if resume is not None:
        if config is not None or space is not None or settings or student or options.earlier:
            raise ConfigError(
                "--resume repeats the search's own config and space; only --trials goes with it, to ask for more"
            )
        return resumed_search(resume, options.trials or None)
    if config is None or space is None:
        raise ConfigError("give a config file and --space FILE, or --resume SEARCH_DIR")
    asked = replace(options, trials=options.trials or NUM_TRIALS)
    return new_search(load_config(config, settings), space, asked, student=student, say=say)


def seeds_of(text: str) -> tuple[int, ...]:
    """Reads seeds as they stand on the command line.

    Example:
        >>> seeds_of("0 1 2"), seeds_of("3,4")
        ((0, 1, 2), (3, 4))
    """
    try:
        return tuple(dict.fromkeys(int(word) for word in text.replace(",", " ").split()))
    except ValueError as error:
        raise ConfigError(
            f"--confirm-seeds {text!r}: expected whole numbers, for instance '0 1 2'"
        ) from error


def print_search(folder: SearchDir, say: Callable[[str], None]) -> None:
    """Prints the table of a search that has ended, and where everything lies.

    Raises:
        RunError: no trial has completed.
    """
    search = read_search(folder.root)
    print_search_table(search, confirmed(search), new_console())
    if search.record["best"] is None:
        raise RunError(f"no trial has completed; {folder.trials_csv} says what became of each")
    say(f"best config: {folder.best} (krd distill {folder.best})")
    say(f"report: {folder.root / 'report/index.html'}")
