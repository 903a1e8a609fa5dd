"""Answers what `krd tune` does with its words: a new search or a resumed one, and what is printed at the end.

Does not search (`search`) and does not read YAML or spaces itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krd_ray.config_io import load_config
from krd_ray.errors import ConfigError, RunError
from krd_ray.report.read_search import read_search
from krd_ray.report.search_page import confirmed
from krd_ray.report.search_text import print_search_table
from krd_ray.report.terminal import new_console
from krd_ray.tune.search import Search, new_search, resumed_search
from krd_ray.tune.search_dir import SearchDir, SearchOptions

NUM_TRIALS = 40
CONFIRM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Asked:
    """The words of `krd tune` about the search itself; None: not said.

    Args:
        trials, epochs, seed, storage, study, at_once: as in `SearchOptions`.
        prune: whether trials are stopped early.
        grace_epochs: epochs before one may be; 0: a quarter of them.
        confirm: whether best and baseline are compared at the end.
        confirm_seeds: seeds of that comparison, as they stand on the command line.
        earlier: folder of the search to begin from.
    """

    trials: int | None = None
    epochs: int | None = None
    seed: int | None = None
    storage: str | None = None
    study: str | None = None
    prune: bool | None = None
    grace_epochs: int | None = None
    at_once: int | None = None
    confirm: bool | None = None
    confirm_seeds: str | None = None
    earlier: Path | None = None

    def options(self) -> SearchOptions:
        """Returns the options of a new search, with a default for everything that was not said."""
        if self.prune is False and self.grace_epochs is not None:
            raise ConfigError(
                "--grace-epochs does not go with --no-prune: no trial is stopped; leave one out"
            )
        seeds = self.seeds()
        return SearchOptions(
            trials=self.trials or NUM_TRIALS,
            epochs=self.epochs or 0,
            seed=self.seed or 0,
            storage=self.storage,
            study=self.study or "",
            grace_epochs=None if self.prune is False else self.grace_epochs or 0,
            at_once=self.at_once,
            confirm_seeds=CONFIRM_SEEDS if seeds is None else seeds,
            earlier=str(self.earlier) if self.earlier else None,
        )

    def seeds(self) -> tuple[int, ...] | None:
        """Returns the seeds of the comparison: empty for none, the usual for --confirm alone, None: nothing said."""
        if self.confirm is False and self.confirm_seeds is not None:
            raise ConfigError("--confirm-seeds does not go with --no-confirm; leave one of them out")
        if self.confirm_seeds is not None:
            return seeds_of(self.confirm_seeds)
        if self.confirm is None:
            return None
        return CONFIRM_SEEDS if self.confirm else ()


def open_search(
    config: Path | None,
    space: Path | None,
    asked: Asked,
    settings: Sequence[str],
    *,
    student: str | None,
    resume: Path | None,
    say: Callable[[str], None],
) -> Search:
    """Checks and opens the search that a person asked for.

    Args:
        config, space: files of a new search; None with `resume`.
        asked: the other words.
        settings: `a.b=c` texts laid over the config.
        student: which of several.
        resume: folder of a search that goes on.
        say: gets lines for people.
    Raises:
        KrdError: words that do not go together, or anything that keeps the search from starting.
    """
    if resume is not None:
        _refuse_with_resume(
            {"CONFIG": config, "--space": space, "--set": settings or None, "--student": student}, asked
        )
        seeds = asked.seeds()
        if asked.confirm and asked.confirm_seeds is None:
            seeds = SearchDir(resume.expanduser()).options().confirm_seeds or seeds
        return resumed_search(
            resume,
            trials=asked.trials,
            at_once=asked.at_once,
            confirm_seeds=seeds,
        )
    if config is None or space is None:
        raise ConfigError("give a config file and --space FILE, or --resume SEARCH_DIR")
    options = asked.options()
    return new_search(load_config(config, settings), space, options, student=student, say=say)


def _refuse_with_resume(of_the_search: dict[str, Any], asked: Asked) -> None:
    """Refuses what a resumed search would have to ignore."""
    words = {
        **of_the_search,
        "--epochs": asked.epochs,
        "--seed": asked.seed,
        "--storage": asked.storage,
        "--study": asked.study,
        "--no-prune" if asked.prune is False else "--prune": asked.prune,
        "--grace-epochs": asked.grace_epochs,
        "--from": asked.earlier,
    }
    said = [word for word, value in words.items() if value is not None]
    if said:
        raise ConfigError(
            f"--resume repeats the search as it was asked for: {', '.join(said)} cannot change; only --trials, "
            "--at-once, --confirm/--no-confirm and --confirm-seeds go with it"
        )


def seeds_of(text: str) -> tuple[int, ...]:
    """Reads seeds as they stand on the command line.

    Example:
        >>> seeds_of("0 1 2"), seeds_of("3,4")
        ((0, 1, 2), (3, 4))
    """
    try:
        seeds = tuple(dict.fromkeys(int(word) for word in text.replace(",", " ").split()))
    except ValueError as error:
        raise ConfigError(
            f"--confirm-seeds {text!r}: expected whole numbers, for instance '0 1 2'"
        ) from error
    if not seeds:
        raise ConfigError(
            "--confirm-seeds: expected at least one seed, for instance '0 1 2'; or --no-confirm"
        )
    return seeds


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
