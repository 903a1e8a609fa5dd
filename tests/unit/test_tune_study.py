"""What a search remembers: a study on disk that is continued, fed from an earlier one, and never unpickled."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from krd_ray.config_io import dump_config, load_config, parse_config
from krd_ray.errors import ConfigError, RunError
from krd_ray.train.rundir import RunDir, StudentDir
from krd_ray.tune import study as names
from krd_ray.tune.confirm import confirmation_config
from krd_ray.tune.outcome import best_config, importance, trial_row, write_trials
from krd_ray.tune.progress import SearchProgress
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.searcher import StopByFile, StudySearch, scheduler_for
from krd_ray.tune.space import Space, load_space
from krd_ray.tune.study import (
    best_trials,
    compromise,
    ended_trials,
    open_storage,
    open_study,
    queue_first,
    replay,
    requeue_interrupted,
    sampler_for,
    take_over,
)
from krd_ray.tune.trial import EPOCH, LAID, NUMBER, STATUS, TRIAL_ERROR
from tests.unit.run_builders import raw_run, write_student

ONE = """
METRIC = "val/few"
MODE = "max"


def space(trial):
    if trial.suggest_categorical("loss.rrd.target", ["teacher", "mix"]) == "mix":
        trial.suggest_float("loss.rrd.gate_strength", 0.0, 1.0)
    trial.suggest_float("loss.lrd.tau_prior", 0.5, 2.5)
"""
TWO = ONE.replace('"val/few"', '["val/few", "val/loss"]').replace('"max"', '["max", "min"]')
CONFIG = parse_config(raw_run(teacher={"weights": "teacher.safetensors"}))


def space_of(folder: Path, text: str = ONE) -> Space:
    path = folder / "space.py"
    path.write_text(text)
    return load_space(path)


class Tune:
    """Plays Ray Tune: asks for trials, reports rows, ends them."""

    def __init__(self, root: Path, space: Space, url: str | None = None, seed: int = 0) -> None:
        self.space, self.storage = space, open_storage(url, root)
        self.study = open_study(self.storage, "search", space)
        self.ended: list[tuple[int, bool]] = []
        sampler = sampler_for(self.study, seed)
        self.search = StudySearch(space, CONFIG, self.storage, "search", sampler, self.hear)

    def hear(self, number: int, lost: bool) -> None:
        self.ended.append((number, lost))

    def begin(self, trial_id: str) -> dict[str, Any]:
        suggested = self.search.suggest(trial_id)
        assert suggested is not None
        return suggested

    def row(self, trial_id: str, epoch: int, **figures: float) -> None:
        self.search.on_trial_result(trial_id, {EPOCH: epoch, **{f"val/{k}": v for k, v in figures.items()}})

    def end(self, trial_id: str, status: str = "finished", error: str | None = None) -> None:
        last = {EPOCH: 2, STATUS: status, TRIAL_ERROR: error, "time_total_s": 3.0}
        self.search.on_trial_complete(trial_id, last)

    def whole(self, trial_id: str, **figures: float) -> None:
        self.begin(trial_id)
        self.row(trial_id, 1, **figures)
        self.end(trial_id)


@pytest.fixture(params=["journal", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"


def test_study_is_told_the_truth_about_every_end(tmp_path: Path, url: str | None) -> None:
    space = space_of(tmp_path)
    tune = Tune(tmp_path, space, url)
    queue_first(tune.study, {"loss.rrd.target": "teacher", "loss.lrd.tau_prior": 1.5})
    first = tune.begin("a")
    assert first == {NUMBER: 0, LAID: {}}, "the baseline is the config as it stands, nothing is laid over it"
    for epoch, few in ((1, 0.1), (2, 0.2)):
        tune.row("a", epoch, few=few, top1=0.5)
    tune.end("a")
    for trial_id in "bcde":
        assert "loss.lrd.tau_prior" in tune.begin(trial_id)[LAID]
    tune.row("b", 1, few=0.05)
    tune.end("b", "stopped")
    tune.end("c", "failed", "it broke")
    tune.row("d", 1, few=float("nan"))
    tune.end("d")
    tune.search.on_trial_complete("e", None, error=True)
    trials = open_study(open_storage(url, tmp_path), "search", space).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL"]
    assert trials[0].value == 0.2
    assert trials[0].intermediate_values == {1: 0.1, 2: 0.2}
    assert trials[0].user_attrs[names.FIGURES] == {"val/few": 0.2, "val/top1": 0.5}
    assert trials[0].user_attrs[names.BASELINE] is True
    assert trials[1].intermediate_values == {1: 0.05}
    assert [trial.user_attrs.get(names.ERROR) for trial in trials[2:]] == [
        "it broke",
        "its last validation row has no finite val/few",
        "the trial's own process died",
    ]
    assert tune.ended == [(0, False), (1, False), (2, False), (3, False), (4, True)]


def test_interrupted_trials_run_again_and_finished_ones_do_not(tmp_path: Path, url: str | None) -> None:
    space = space_of(tmp_path)
    before = Tune(tmp_path, space, url)
    queue_first(before.study, {"loss.rrd.target": "teacher"})
    before.begin("a")  # the baseline is running when the driver dies
    before.whole("b", few=0.3)
    running = before.begin("c")[LAID]
    del before
    after = Tune(tmp_path, space, url)
    assert requeue_interrupted(after.study) == [0, 2]
    assert requeue_interrupted(after.study) == []
    assert [trial.number for trial in ended_trials(after.study)] == [1]
    again = [after.begin(trial_id) for trial_id in "de"]
    assert again[0] == {NUMBER: 3, LAID: {}}, "still the baseline"
    assert again[1] == {NUMBER: 4, LAID: running}
    rows = {row["number"]: row["state"] for row in write_trials(SearchDir(tmp_path), after.study)}
    assert rows == {0: "interrupted", 1: "complete", 2: "interrupted", 3: "running", 4: "running"}


def test_resumed_search_does_not_draw_its_first_points_again(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    drawn = []
    for session in range(3):
        tune = Tune(tmp_path, space)
        drawn += [tune.begin(f"{session}{trial}")[LAID]["loss.lrd.tau_prior"] for trial in range(3)]
    assert len(set(drawn)) == 9
    (tmp_path / "other").mkdir()
    same = Tune(tmp_path / "other", space)
    assert [same.begin(trial)[LAID]["loss.lrd.tau_prior"] for trial in "abc"] == drawn[:3], "seeded"


def test_study_of_other_objectives_and_storage_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    Tune(tmp_path, space_of(tmp_path))
    with pytest.raises(ConfigError, match="is to maximize, this space wants to maximize, minimize"):
        Tune(tmp_path, space_of(tmp_path, TWO))
    with pytest.raises(ConfigError, match="expected sqlite:///FILE"):
        open_storage("nonsense", tmp_path)


def test_earlier_search_brings_its_trials_and_its_best(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = Tune(tmp_path / "old", space_of(tmp_path))
    old.study.enqueue_trial(
        {"loss.rrd.target": "mix", "loss.rrd.gate_strength": 0.5, "loss.lrd.tau_prior": 1.0}
    )
    old.whole("a", few=0.4)
    old.study.enqueue_trial({"loss.rrd.target": "teacher", "loss.lrd.tau_prior": 2.4})
    old.whole("b", few=0.3)
    old.begin("c")
    narrower = space_of(tmp_path, ONE.replace("2.5", "2.0"))
    (tmp_path / "new").mkdir()
    new = Tune(tmp_path / "new", narrower)
    assert take_over(new.study, old.study, narrower, "old", values=True) == (1, 1), "2.4 lies outside now"
    added, queued = new.study.trials
    assert added.value == 0.4
    assert added.user_attrs[names.SOURCE] == "old"
    assert added.user_attrs[names.FIGURES] == {"val/few": 0.4}
    assert queued.state == TrialState.WAITING
    assert ended_trials(new.study) == [], "what was added does not count as a trial of this search"
    assert new.begin("x")[LAID] == added.params
    other = Tune(tmp_path, narrower)
    assert take_over(other.study, old.study, narrower, "old", values=False) == (0, 1)
    assert replay(narrower, {**added.params, "loss.kd.weight": 1.0}) is None, (
        "a parameter that it never draws"
    )


def test_front_holds_what_nothing_beats_and_best_yaml_takes_the_compromise(tmp_path: Path) -> None:
    tune = Tune(tmp_path, space_of(tmp_path, TWO))
    for trial_id, few, loss in (("a", 0.1, 1.0), ("b", 0.3, 2.0), ("c", 0.28, 1.1), ("d", 0.05, 1.5)):
        tune.whole(trial_id, few=few, loss=loss)
    front = best_trials(tune.study)
    assert [trial.number for trial in front] == [1, 2, 0]
    assert compromise(tune.study, front).number == 2
    assert importance(tune.study, tune.space).keys() == {"val/few", "val/loss"}


def test_best_is_a_whole_config_that_the_config_language_reads(tmp_path: Path) -> None:
    tune = Tune(tmp_path, space_of(tmp_path))
    assert best_trials(tune.study) == []
    for trial_id, few in (("a", 0.1), ("b", 0.3), ("c", 0.3)):
        tune.whole(trial_id, few=few)
    (best,) = best_trials(tune.study)
    assert best.number == 1, "the earlier one of equals"
    config = best_config(CONFIG, best)
    assert config.loss.lrd.tau_prior == best.params["loss.lrd.tau_prior"]
    path = tmp_path / "best.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_importance_needs_trials_that_differ(tmp_path: Path) -> None:
    tune = Tune(tmp_path, space_of(tmp_path))
    for index in range(6):
        tune.whole(f"t{index}", few=0.2)
    assert importance(tune.study, tune.space) == {}
    for index in range(20):
        suggested = tune.begin(f"u{index}")[LAID]
        tune.row(f"u{index}", 1, few=suggested["loss.lrd.tau_prior"] / 10)
        tune.end(f"u{index}")
    shares = importance(tune.study, tune.space)["val/few"]
    assert max(shares, key=lambda name: shares[name]) == "loss.lrd.tau_prior"
    assert sum(shares.values()) == pytest.approx(1)


class _Trial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def test_trial_that_falls_behind_is_asked_to_stop_and_never_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path, members="trials")
    space = space_of(tmp_path)
    scheduler = scheduler_for(space, epochs=9, grace=1, run=run, number_of=int)
    assert isinstance(scheduler, StopByFile)
    for number in range(4):
        run.student(str(number)).root.mkdir(parents=True)
        scheduler.on_trial_add(None, _Trial(str(number)))
    for number, few in enumerate((0.5, 0.4, 0.6, 0.1)):
        assert scheduler.on_trial_result(None, _Trial(str(number)), {EPOCH: 1, "val/few": few}) == "CONTINUE"
    assert [run.student(str(number)).stop.exists() for number in range(4)] == [False, True, False, True]
    last = {EPOCH: 1, STATUS: "stopped", "val/few": 0.1}
    assert scheduler.on_trial_result(None, _Trial("3"), last) == "CONTINUE"
    for number in range(4):
        scheduler.on_trial_complete(None, _Trial(str(number)), last)


def test_nothing_is_stopped_with_two_objectives_or_when_switched_off(tmp_path: Path) -> None:
    run = RunDir(tmp_path, members="trials")
    for text, grace in ((TWO, 1), (ONE, None)):
        scheduler = scheduler_for(space_of(tmp_path, text), epochs=4, grace=grace, run=run, number_of=int)
        assert type(scheduler).__name__ == "FIFOScheduler"


def test_confirmation_pairs_best_and_baseline_and_reads_the_searchs_store(tmp_path: Path) -> None:
    folder = SearchDir(tmp_path)
    best = {"number": 7, "settings": {"students.s.model": "digits_net_8"}}
    found = confirmation_config(CONFIG, best, folder, seeds=(0, 1), at_once=2)
    assert [student.name for student in found.students] == [
        "baseline.s0",
        "best.s0",
        "baseline.s1",
        "best.s1",
    ]
    assert [student.model for student in found.students[:2]] == ["digits_net_4", "digits_net_8"]
    assert [found.seed_of(student) for student in found.students] == [0, 0, 1, 1]
    assert found.teacher is not None
    assert found.teacher.persist
    assert found.teacher.spill_dir == str(tmp_path / "teacher/store")
    assert found.students_at_once == 2
    assert found.run_dir == str(tmp_path / "confirm/7")


def test_search_folder_keeps_what_a_resume_needs_and_is_not_taken_twice(tmp_path: Path) -> None:
    space, options = space_of(tmp_path), SearchOptions(8, 4, confirm_seeds=(0, 1))
    folder = SearchDir(tmp_path / "search")
    folder.create(options, space, CONFIG)
    space.path.unlink()
    assert folder.options() == options
    assert folder.config() == CONFIG
    assert folder.space().text_hash == space.text_hash
    with pytest.raises(RunError, match="krd tune --resume"):
        folder.create(options, space, CONFIG)
    with pytest.raises(RunError, match="is not a search directory"):
        SearchDir(tmp_path).read()


def test_progress_has_a_line_per_ended_trial_and_a_table_of_those_that_run(tmp_path: Path) -> None:
    tune = Tune(tmp_path, space_of(tmp_path))
    folder, options = SearchDir(tmp_path), SearchOptions(3, 4)
    folder.run.make_folders()
    write_student(folder.run, "9", epochs=1)  # of an earlier session
    tune.whole("a", few=0.25)
    tune.begin("b")
    tune.end("b", "failed", "it broke\nin many lines")
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        with SearchProgress(folder, options, tune.space, console) as progress:
            write_student(folder.run, f"{terminal:d}", epochs=2)
            progress.refresh()
            progress.ended(tune.study, 0)
            progress.ended(tune.study, 1)
            progress.refresh()
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert "2/3 trial 0: complete after 1 epoch(s) | val/few 0.25 | loss.rrd.target=" in printed
        assert "| it broke | best val/few 0.25 (trial 0)" in printed
        assert ("2/4" in printed) == terminal, "the running trial's epochs"
        assert "1/4" not in printed, "the trial of the earlier session does not run"


def shown_after(progress: SearchProgress, console: Console) -> str:
    """What the table shows now."""
    file = console.file
    before = len(file.getvalue())  # type: ignore[attr-defined]
    progress.refresh()
    return str(file.getvalue()[before:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("seen", [True, False], ids=["while the table is read", "before the table saw it"])
def test_trial_that_has_ended_does_not_come_back_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    tune = Tune(tmp_path, space_of(tmp_path))
    folder, options = SearchDir(tmp_path), SearchOptions(3, 4)
    folder.run.make_folders()
    tune.whole("a", few=0.25)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with SearchProgress(folder, options, tune.space, console) as progress:
        write_student(folder.run, "0", epochs=2)
        ending = threading.Thread(target=progress.ended, args=(tune.study, 0))
        if seen:
            read = StudentDir.rows_after

            def end_meanwhile(self: StudentDir, offset: int) -> Any:
                rows = read(self, offset)
                if ending.ident is None:
                    ending.start()
                    ending.join(timeout=0.3)
                return rows

            monkeypatch.setattr(StudentDir, "rows_after", end_meanwhile)
            progress.refresh()
        else:
            ending.start()
        ending.join()
        assert "2/4" not in shown_after(progress, console)


def test_row_of_a_trial_has_every_column_whatever_became_of_it() -> None:
    waiting = optuna.trial.create_trial(state=TrialState.WAITING)
    row = trial_row(waiting, ["loss.rrd.weight"])
    assert row["state"] == "queued"
    assert row["param loss.rrd.weight"] is None
    assert "val/few" in row


def test_trial_whose_settings_cannot_be_drawn_fails_alone(tmp_path: Path) -> None:
    body = '    if trial.number == 1:\n        raise RuntimeError("a rare branch")\n'
    tune = Tune(tmp_path, space_of(tmp_path, ONE + body))
    tune.begin("a")
    suggested = tune.begin("b")
    assert "space() raised RuntimeError: a rare branch" in suggested[TRIAL_ERROR]
    assert LAID in tune.begin("c")
