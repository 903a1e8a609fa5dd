"""Answers where everything of a search lies on disk, and what a search must know to go on.

Does not interpret the study.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from krd_ray.atomic import write_text
from krd_ray.config import RunConfig
from krd_ray.config_io import dump_config, load_config
from krd_ray.errors import RunError
from krd_ray.storage.places import require_folder
from krd_ray.teacher.lock import hold_lock
from krd_ray.train.rundir import RunDir, read_json, write_json
from krd_ray.tune.space import Space, load_space

TRIALS = "trials"
LOCK_WAIT_S = 5.0  # a driver that was killed may take a moment to die


@dataclass(frozen=True)
class SearchOptions:
    """What `krd tune` was asked for; a resumed search reads it back.

    Args:
        trials: how many, the baseline included.
        epochs: of a trial.
        seed: of the sampler.
        storage: URL of the study; None: a journal file in the search's folder.
        study: its name in the storage.
        grace_epochs: epochs before a trial may be stopped; None: none is.
        at_once: trials that run at the same time; None: as many as the cluster holds.
        confirm_seeds: seeds of the comparison with the baseline at the end; empty: none is made.
        earlier: folder of the search that this one began from.
    """

    trials: int
    epochs: int
    seed: int = 0
    storage: str | None = None
    study: str = ""
    grace_epochs: int | None = None
    at_once: int | None = None
    confirm_seeds: tuple[int, ...] = ()
    earlier: str | None = None


@dataclass(frozen=True)
class SearchDir:
    """The folder of one search."""

    root: Path

    def __post_init__(self) -> None:
        require_folder(self.root, "run_dir of a search")

    @property
    def run(self) -> RunDir:
        """The trials, as students of a run."""
        return RunDir(self.root, members=TRIALS)

    @property
    def record(self) -> Path:
        return self.root / "search.json"

    @property
    def base(self) -> Path:
        """The config as it stands, without the search's own changes."""
        return self.root / "base.yaml"

    @property
    def best(self) -> Path:
        return self.root / "best.yaml"

    @property
    def trials_csv(self) -> Path:
        return self.root / "trials.csv"

    def confirmation(self, number: int) -> Path:
        """Returns the run that compares a trial with the baseline; with more trials another may become the best."""
        return self.root / "confirm" / str(number)

    def hold(self) -> IO[bytes]:
        """Makes this process the search's only driver, until the returned file is closed or it dies.

        Raises:
            RunError: another one works on it.
        """
        path = self.root / ".lock"
        busy = RunError(
            f"another `krd tune` works on {self.root} and holds {path}; one search has one driver: wait until that "
            "one has ended, or stop it, then try again"
        )
        return hold_lock(path, busy, wait_s=LOCK_WAIT_S)

    def refuse_taken(self) -> None:
        """Raises RunError where the folder holds a search already."""
        if self.record.exists():
            raise RunError(
                f"{self.root} holds a search already; continue it with `krd tune --resume {self.root}`, "
                "or choose another run_dir"
            )

    def create(self, options: SearchOptions, space: Space, config: RunConfig) -> None:
        """Makes the folder of a new search; search.json comes last, only then is it one.

        Raises:
            RunError: the folder holds a search already.
        """
        self.refuse_taken()
        self.run.make_folders()
        write_text(self.base, dump_config(config))
        copy = f"space{space.path.suffix}"
        write_text(self.root / copy, space.text)
        write_json(
            self.record,
            {
                "name": config.name,
                "student": config.students[0].name,
                "metric": list(space.metrics),
                "mode": list(space.modes),
                "baseline": space.baseline,
                "space": {"file": copy, "from": space.path.name, "hash": space.text_hash},
                "options": asdict(options),
            },
        )

    def add(self, **entries: Any) -> None:
        """Writes further entries into search.json."""
        write_json(self.record, {**self.read(), **entries})

    def read(self) -> dict[str, Any]:
        """Returns search.json.

        Raises:
            RunError: this is no search directory.
        """
        if not self.record.is_file():
            raise RunError(f"{self.root} is not a search directory: it has no search.json")
        return dict(read_json(self.record))

    def options(self) -> SearchOptions:
        """Returns what the search was asked for."""
        found = self.read()["options"]
        return SearchOptions(**{**found, "confirm_seeds": tuple(found["confirm_seeds"])})

    def config(self) -> RunConfig:
        """Returns the config as it stood."""
        return load_config(self.base)

    def space(self) -> Space:
        """Returns the search's own copy of its space."""
        return load_space(self.root / self.read()["space"]["file"])
