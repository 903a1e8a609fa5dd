"""Answers how Ray Tune is told to run the trials: processes without CPUs of their own, no files but the study.

Does not choose trials (`searcher`) and does not train (`trial`).
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable

import ray
from ray import tune
from ray.tune import TuneConfig
from ray.tune.schedulers import TrialScheduler
from ray.util.placement_group import PlacementGroup, remove_placement_group

from krd_ray.train.rundir import StudentDir
from krd_ray.tune.searcher import StudySearch
from krd_ray.tune.trial import TrialKit, run_trial

TICK_S = 0.5
# Read by Ray Tune in the driver; a value the user has set wins.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study and metrics.jsonl hold all results
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no metric
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # its own snapshots are never read
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its progress is not ours
}
SHARE_OF_NODE = 0.001


def run_trials(
    kit: TrialKit,
    search_alg: StudySearch,
    scheduler: TrialScheduler,
    *,
    num: int,
    at_once: int,
    tick: Callable[[], None],
) -> None:
    """Runs trials until `num` have ended.

    Ray Tune runs in a thread, so that a signal reaches the driver's own wait and not some place inside Ray.
    A trial's process reserves no CPU, only a crumb of the driver's node: its students reserve what they need.

    Args:
        kit: what all trials share.
        search_alg: suggests.
        scheduler: stops.
        num: trials to run.
        at_once: at the same time.
        tick: called every now and then.
    Raises:
        Exception: whatever Ray Tune raised; a trial that fails raises nothing.
    """
    tuner = _tuner(kit, search_alg, scheduler, num=num, at_once=at_once)
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the driver's own thread
            raised.append(error)

    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    thread.start()
    pause = threading.Event()
    while thread.is_alive():
        pause.wait(TICK_S)
        tick()
    if raised:
        raise raised[0]


def give_back(folder: StudentDir) -> None:
    """Removes the reservations of a trial whose own process was killed, and whose Ray Train run died with it.

    Ray Train's cleaner would need the dashboard for that. A run that had not come to start its workers is not known.

    Args:
        folder: of the trial.
    """
    groups = {row.get("placement_group") for row in folder.rows() if row["split"] == "start"}
    for group in groups - {None}:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(str(group)))))


def _tuner(
    kit: TrialKit, search_alg: StudySearch, scheduler: TrialScheduler, *, num: int, at_once: int
) -> tune.Tuner:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for logger in ("ray.tune", "ray.air", "ray.train"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    crumb = {f"node:{ray.util.get_node_ip_address()}": SHARE_OF_NODE}
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, kit=kit), tune.PlacementGroupFactory([crumb])
    )
    return tune.Tuner(
        trainable,
        tune_config=TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler,
            num_samples=num,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"session-{uuid.uuid4().hex[:8]}",
            storage_path=str(kit.run.root / "ray_tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
