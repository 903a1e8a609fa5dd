"""Answers what a search leaves behind: trials.csv, best.yaml, search.json, ledger.json, all from study and trials.

Does not draw (`report.search_page` does, from these files alone).
"""

from __future__ import annotations

import csv
import io
import warnings
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from krd_ray.atomic import write_text
from krd_ray.config import RunConfig
from krd_ray.config_io import dump_config
from krd_ray.teacher.messages import RECEIVED_BYTES
from krd_ray.train.ledger import build_ledger
from krd_ray.train.prepare import Prepared
from krd_ray.train.rundir import RunDir, write_json
from krd_ray.tune import study as names
from krd_ray.tune.laying import lay
from krd_ray.tune.search_dir import SearchDir
from krd_ray.tune.space import BETTER, PREFIX, Space
from krd_ray.tune.study import best_trials, compromise, ended_trials, own_trials

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "queued",
}
PARAM = "param "  # prefix of the columns of trials.csv that hold parameters
MIN_TRIALS_OF_IMPORTANCE = 4
FRONT = "front"


def trial_row(trial: FrozenTrial, parameters: list[str]) -> dict[str, Any]:
    """One line of trials.csv; None where nothing is known.

    Args:
        trial: of the study.
        parameters: all names, so that every line has the same columns.
    """
    attributes = trial.user_attrs
    figures = attributes.get(names.FIGURES, {})
    return {
        "number": trial.number,
        "state": "interrupted" if attributes.get(names.INTERRUPTED) else STATES[trial.state],
        "baseline": bool(attributes.get(names.BASELINE)),
        "from": attributes.get(names.SOURCE),
        **{f"{PREFIX}{name}": figures.get(f"{PREFIX}{name}") for name in BETTER},
        "epochs": attributes.get(names.EPOCHS, 0),
        "seconds": attributes.get(names.SECONDS),
        **{f"{PARAM}{name}": trial.params.get(name) for name in parameters},
        "error": attributes.get(names.ERROR),
    }


def write_trials(folder: SearchDir, study: optuna.Study) -> list[dict[str, Any]]:
    """Writes trials.csv, a line per trial of the study, and returns the lines."""
    trials = study.get_trials(deepcopy=False)
    parameters = list(dict.fromkeys(name for trial in trials for name in trial.params))
    rows = [trial_row(trial, parameters) for trial in trials]
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder.trials_csv, text.getvalue())
    return rows


def write_end(
    folder: SearchDir,
    config: RunConfig,
    space: Space,
    prepared: Prepared,
    study: optuna.Study,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Writes everything that a search leaves behind.

    Args:
        folder: of the search.
        config: as it stands.
        space: what was searched.
        prepared: data and teacher.
        study: its trials.
        seconds: wall time of this driver.
    Returns:
        The content of search.json; its `best` is None where no trial has completed.
    """
    write_trials(folder, study)
    ended = ended_trials(study)
    record = folder.read()
    counts = {state: sum(trial.state is kind for trial in ended) for kind, state in STATES.items()}
    folder.add(
        counts={state: counts[state] for state in ("complete", "stopped", "failed")},
        seconds=[*record.get("seconds", []), seconds],
        num_train=prepared.manifest.splits["train"].num_rows,
        cycle=prepared.config.views.cycle,
    )
    _write_ledger(folder.run, prepared, config, study)
    front = best_trials(study)
    if not front:
        folder.add(best=None, front=[], importance={})
        return folder.read()
    chosen = compromise(study, front)
    write_text(folder.best, dump_config(best_config(config, chosen)))
    for trial in front if len(space.metrics) > 1 else []:
        write_text(folder.root / FRONT / f"{trial.number}.yaml", dump_config(best_config(config, trial)))
    folder.add(
        best={
            "number": chosen.number,
            "baseline": bool(chosen.user_attrs.get(names.BASELINE)),
            "values": dict(zip(space.metrics, chosen.values, strict=True)),
            "settings": chosen.user_attrs[names.SETTINGS],
        },
        front=[trial.number for trial in front],
        importance=importance(study, space),
    )
    return folder.read()


def best_config(config: RunConfig, trial: FrozenTrial) -> RunConfig:
    """The config with a trial's settings laid over it, ready for `krd distill`: same epochs, no run_dir.

    Args:
        config: as it stood.
        trial: of the search.
    """
    laid = lay(config, trial.user_attrs[names.SETTINGS])
    return laid.model_copy(update={"run_dir": None})


def importance(study: optuna.Study, space: Space) -> dict[str, dict[str, float]]:
    """How much of the spread of each metric each parameter explains (PED-ANOVA, arXiv 2304.10255), summing to 1.

    Returns:
        metric -> parameter -> share; no entry for a metric with fewer than 4 complete trials, or of which all trials
        reached the same.
    """
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    found = {}
    for index, metric in enumerate(space.metrics):
        values = {trial.values[index] for trial in complete}
        if len(complete) >= MIN_TRIALS_OF_IMPORTANCE and len(values) > 1:
            sign = -1.0 if space.modes[index] == "max" else 1.0  # the evaluator asks what makes a target low
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # about the sign, and few trials, which the page says
                shares = optuna.importance.get_param_importances(study, target=_value_of(index, sign))
            found[metric] = {name: float(share) for name, share in shares.items()}
    return found


def _value_of(index: int, sign: float) -> Any:
    def value(trial: FrozenTrial) -> float:
        return sign * float(trial.values[index])

    return value


def _write_ledger(run: RunDir, prepared: Prepared, config: RunConfig, study: optuna.Study) -> None:
    """The ledger of a run whose students are the trials.

    A trial that never trained is not among them; one that died with its driver is, for it has cost something too.
    """
    trained = [trial for trial in own_trials(study) if run.student(str(trial.number)).metrics.is_file()]
    ended = {str(trial.number) for trial in ended_trials(study)}
    trials = [str(trial.number) for trial in trained]
    taught = [
        str(trial.number)
        for trial in trained
        if _asks(run, str(trial.number)) and _needs_teacher(config, trial)
    ]
    ledger = build_ledger(run, trials, taught=taught, driver_bytes=RECEIVED_BYTES, on_cpu=config.on_cpu)
    ledger["search"] = sharing(ledger, prepared, [name for name in taught if name in ended])
    write_json(run.ledger, ledger)


def _asks(run: RunDir, name: str) -> bool:
    return any(row["split"] == "train" for row in run.student(name).rows())


def _needs_teacher(config: RunConfig, trial: FrozenTrial) -> bool:
    laid = lay(config, trial.user_attrs[names.SETTINGS])
    return laid.loss_of(laid.students[0]).needs_teacher


def sharing(ledger: dict[str, Any], prepared: Prepared, taught: list[str]) -> dict[str, Any]:
    """What one teacher for all trials saved, in forwards.

        one teacher per trial = sum over trials of min(epochs trained, views.cycle) * images

    Each of those would keep its own store, so that it too forwards a view once.

    Returns:
        `trial_seconds`: all trials' seconds of training and waiting; `forwards_one_teacher_per_trial`, of trials that
        ended by themselves; `forwards`, of all sessions; `forwards_saved`.
    """
    cycle, num_images = prepared.config.views.cycle, prepared.manifest.splits["train"].num_rows
    epochs = [ledger["students"][name]["epochs"] for name in taught]
    alone = sum(min(each, cycle) if cycle else each for each in epochs) * num_images
    forwards = ledger["teacher"]["forwards"] if ledger["teacher"] else 0
    seconds = sum(
        entry["compute_s"] + entry["wait_targets_s"] + entry["wait_data_s"]
        for entry in ledger["students"].values()
    )
    return {
        "trial_seconds": seconds,
        "forwards_one_teacher_per_trial": alone,
        "forwards": forwards,
        "forwards_saved": alone - forwards,
    }
