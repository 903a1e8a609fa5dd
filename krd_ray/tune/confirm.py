"""Answers whether the best is worth having: it and the baseline, trained again with several seeds and tested once.

Does not judge (`report.verdict` does); it is an ordinary run that reads the search's target store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from krd_ray.atomic import write_text
from krd_ray.config import RunConfig
from krd_ray.config_io import dump_config, parse_config
from krd_ray.errors import RunError
from krd_ray.report.page import build_report
from krd_ray.report.verdict import BASELINE, BEST
from krd_ray.train.assess import evaluate_run
from krd_ray.train.prepare import prepare
from krd_ray.train.run import Outcome, resume_run, start_run
from krd_ray.train.rundir import RunDir, read_json
from krd_ray.tune.laying import trial_student
from krd_ray.tune.search_dir import SearchDir


def confirmation_config(
    config: RunConfig,
    best: Mapping[str, Any],
    folder: SearchDir,
    *,
    seeds: Sequence[int],
    at_once: int | None,
) -> RunConfig:
    """Returns the run that trains baseline and best with every seed, all from the search's own target store.

    Args:
        config: of one student, as it stands; with all its epochs.
        best: the best trial's `number` and `settings`.
        folder: of the search.
        seeds: of weights and order; the views stay shared.
        at_once: students that train at the same time.
    """
    students = [
        trial_student(config, laid, f"{method}.s{seed}").model_copy(update={"seed": seed, "method": method})
        for seed in seeds
        for method, laid in ((BASELINE, {}), (BEST, best["settings"]))
    ]
    raw = config.model_dump(mode="json")
    raw |= {
        "name": f"{config.name[:56]}-confirm",
        "run_dir": str(folder.confirmation(best["number"])),
        "students": [student.model_dump(mode="json") for student in students],
        "students_at_once": at_once,
        "evaluate": True,
    }
    if raw["teacher"] is not None:
        raw["teacher"]["persist"] = True
        raw["teacher"]["spill_dir"] = raw["teacher"]["spill_dir"] or str(folder.run.teacher / "store")
    return parse_config(raw)


def confirm_best(
    config: RunConfig,
    folder: SearchDir,
    *,
    seeds: Sequence[int],
    at_once: int | None,
    say: Callable[[str], None],
) -> Path:
    """Trains, tests and reports the confirmation, or goes on with one that was interrupted.

    Args:
        config: of one student, as it stands.
        folder: of a search that has a best trial.
        seeds, at_once: as for `confirmation_config`.
        say: gets lines for people.
    Returns:
        Its run directory.
    Raises:
        RunError: a student did not finish.
    """
    best = folder.read()["best"]
    wanted = confirmation_config(config, best, folder, seeds=seeds, at_once=at_once)
    root = folder.confirmation(best["number"])
    epochs = wanted.train_of(wanted.students[0]).epochs
    folder.add(confirm_epochs=epochs)
    say(
        f"confirming trial {best['number']}: it and the baseline, seeds {', '.join(map(str, seeds))}, {epochs} epochs"
    )
    outcome = _go_on(wanted, RunDir(root)) if RunDir(root).config.is_file() else start_run(wanted)
    if outcome.failed:
        names = ", ".join(str(result["student"]) for result in outcome.failed)
        raise RunError(
            f"the confirmation in {root} is not complete: {names} did not finish; mend the cause, then "
            f"`krd tune --resume {folder.root}`"
        )
    evaluate_run(root, again=outcome.num_trained > 0 or not _is_tested(wanted, RunDir(root)))
    build_report(root)
    return root


def _go_on(wanted: RunConfig, run: RunDir) -> Outcome:
    """Goes on with a confirmation, whose seeds and number at once are those asked for now; what is trained stays."""
    write_text(run.config, dump_config(prepare(wanted).config))
    return resume_run(run.root)


def _is_tested(wanted: RunConfig, run: RunDir) -> bool:
    """Whether every student has test figures; after a change of seeds some may have been trained without."""
    tested = read_json(run.evaluation)["models"] if run.evaluation.is_file() else {}
    return all(student.name in tested for student in wanted.students)
