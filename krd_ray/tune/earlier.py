"""Answers what a new search can take from an earlier one: its trials with their figures, or its best as a guess.

Does not change the earlier search.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna import Study

from krd_ray.config import RunConfig
from krd_ray.errors import ConfigError, RunError
from krd_ray.train.rundir import read_json
from krd_ray.tune.search_dir import SearchDir
from krd_ray.tune.space import Space
from krd_ray.tune.study import JOURNAL, has_study, open_storage, open_study, take_over


@dataclass(frozen=True)
class Earlier:
    """An earlier search that a new one can begin from.

    Args:
        root: its folder.
        study: its study.
        comparable: same images, epochs and config: its trials would have reached the same in the new search.
    """

    root: Path
    study: Study
    comparable: bool


def open_earlier(root: Path, space: Space, config: RunConfig, *, epochs: int, content_hash: str) -> Earlier:
    """Opens an earlier search and checks that a new one can begin from it.

    Args:
        root: its folder.
        space, config, epochs: of the new search.
        content_hash: of the new search's shards.
    Raises:
        RunError: no search directory, or its study is gone.
        ConfigError: it searched for other metrics.
    """
    folder = SearchDir(root.expanduser().resolve())
    record, options = folder.read(), folder.options()
    if record["metric"] != list(space.metrics):
        raise ConfigError(
            f"--from {folder.root}: it searched for {', '.join(record['metric'])}, this space has METRIC "
            f"{', '.join(space.metrics)}; begin from a search for the same, or leave --from out"
        )
    storage = open_storage(options.storage, folder.root)
    if not has_study(storage, options.study):
        raise RunError(
            f"--from {folder.root}: its study {options.study} is not in {options.storage or folder.root / JOURNAL} "
            "any more; restore it, or leave --from out"
        )
    study = open_study(storage, options.study, folder.space())
    same_data = read_json(folder.run.dataset)["content_hash"] == content_hash
    same = same_data and options.epochs == epochs and _bare(folder.config()) == _bare(config)
    return Earlier(folder.root, study, same)


def begin_from(study: Study, earlier: Earlier, space: Space) -> str:
    """Feeds an earlier search into a new one, and says what came of it."""
    added, queued = take_over(study, earlier.study, space, str(earlier.root), values=earlier.comparable)
    why = "" if earlier.comparable else " (other images, epochs or config: its figures cannot be compared)"
    rule = "" if added or queued else "; only trials with exactly this space's parameters, in its ranges, fit"
    return f"from {earlier.root}: {added} finished trial(s) added{why}, {queued} best queued{rule}"


def _bare(config: RunConfig) -> dict[str, Any]:
    """What a trial's figures depend on, besides its own settings."""
    return config.model_dump(exclude={"name", "run_dir", "ray", "students_at_once", "evaluate"})
