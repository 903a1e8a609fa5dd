"""Answers how one trial runs: an ordinary student of the search, its validation rows told to Ray Tune.

Does not decide anything: what to try comes from `searcher`, and whether to go on too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from ray import tune

from krd_ray.config import RunConfig, StudentConfig
from krd_ray.errors import ConfigError, KrdError
from krd_ray.teacher.ports import TeacherLink
from krd_ray.train.prepare import Prepared, resolve_student
from krd_ray.train.run import students_run
from krd_ray.train.rundir import RunDir
from krd_ray.tune.laying import trial_student
from krd_ray.tune.space import PREFIX, Settings

LOOK_S = 0.2
EPOCH, STATUS, TRIAL_ERROR = "epoch", "status", "error"
NUMBER, LAID = "number", "settings"


@dataclass(frozen=True)
class TrialKit:
    """What all trials of a search share.

    Args:
        config: of one student, as it stands; the trial's settings are laid over it.
        prepared: the checked search, with cached blocks where there are any.
        run: the search's folder.
        link: to the teacher, by name.
    """

    config: RunConfig
    prepared: Prepared
    run: RunDir
    link: TeacherLink | None

    def student(self, number: int, settings: Settings) -> StudentConfig:
        """Returns the student of a trial."""
        student = trial_student(self.config, settings, str(number))
        return resolve_student(self.prepared.config, student)


def run_trial(config: dict[str, Any], kit: TrialKit) -> None:
    """Trains one trial's student to its end; the function that Ray Tune calls in a process of its own.

    Each validation row is reported as it appears in metrics.jsonl, under the epoch's number counted from 1 (a row of
    an epoch that a restarted worker trained again is not reported twice). The last report says how it ended; an
    error ends this trial only.
    """
    reached = 0
    try:
        if TRIAL_ERROR in config:
            raise ConfigError(config[TRIAL_ERROR])
        student = kit.student(config[NUMBER], config[LAID])
        link = kit.link.attached() if kit.link is not None else None
        run = students_run(kit.prepared, kit.run, [student], link)
        folder = kit.run.student(student.name)
        run.start()
        pause, offset, going = threading.Event(), 0, True
        while going:
            pause.wait(LOOK_S)
            going = run.state == "training"
            rows, offset = folder.rows_after(offset)
            for row in rows:
                if row["split"] == "val" and row["epoch"] + 1 > reached:
                    reached = row["epoch"] + 1
                    tune.report({EPOCH: reached, **figures_of(row)})
        (result,) = run.finish()
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this trial and no other
        message = error.message if isinstance(error, KrdError) else f"{type(error).__name__}: {error}"
        tune.report({EPOCH: reached, STATUS: "failed", TRIAL_ERROR: message})
        return
    tune.report({EPOCH: reached, STATUS: result["status"], TRIAL_ERROR: result["error"]})


def figures_of(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a validation row, under the names that a space's METRIC uses.

    Example:
        >>> figures_of({"split": "val", "epoch": 0, "few": 0.25, "many": None, "student": "7", "num_samples": 10})
        {'val/few': 0.25}
    """
    fixed = ("time", "epoch", "step", "attempt", "num_samples")
    return {
        f"{PREFIX}{key}": float(value)
        for key, value in row.items()
        if key not in fixed and isinstance(value, int | float) and not isinstance(value, bool)
    }
