"""How a search begins and ends around its trials: what is checked before anything is made, who may work on it, which
error is told. No Ray: the trials themselves are played."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from krd_ray.config import RunConfig
from krd_ray.config_io import load_config, parse_config
from krd_ray.data.shard_options import ShardOptions
from krd_ray.data.shards import write_shards
from krd_ray.data.sources import SourceSpec, open_source
from krd_ray.errors import ConfigError, Interrupted, KrdError, ResourceError, RunError
from krd_ray.models.registry import build_model
from krd_ray.teacher.weights import ModelCard, save_weights
from krd_ray.tune import confirm, search, search_dir
from krd_ray.tune.search import Search, new_search, resumed_search, run_search
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.study import open_storage, open_study
from tests.unit.run_builders import raw_run

SPACE = """
METRIC = "val/few"
MODE = "max"


def space(trial):
    trial.suggest_float("loss.lrd.weight", 0.1, 10.0, log=True)
"""
BALANCED = SPACE.replace("val/few", "val/balanced")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of digits and a teacher's weights beside them."""
    folder = tmp_path_factory.mktemp("search")
    options = ShardOptions(imbalance_ratio=40, n_max=80, val_per_class=2, store="raw", image_size=8)
    write_shards(open_source(SourceSpec(kind="digits")), folder / "digits", options)
    net = build_model("digits_net_4", num_classes=10, image_size=8, seed=0)
    card = ModelCard("digits_net_4", 10, 8, (0, 0, 0), (1, 1, 1), "")
    save_weights(net.state_dict(), card, folder / "teacher.safetensors")
    return folder


def config_of(data: Path, root: Path, **more: Any) -> RunConfig:
    raw = {
        "run_dir": str(root),
        "teacher": {"weights": str(data / "teacher.safetensors")},
        "loss": {"lrd": {"weight": 1}},
        "views": {"cycle": 2},
        **more,
    }
    return parse_config(raw_run(data / "digits", **raw))


def opened(
    data: Path, root: Path, text: str = SPACE, said: list[str] | None = None, **options: Any
) -> Search:
    """A new search in `root`."""
    space = root.with_name(f"{root.name}-space.py")
    space.write_text(text)
    wanted = SearchOptions(**{"trials": 3, "epochs": 2, **options})
    say = (said if said is not None else []).append
    return new_search(config_of(data, root), space, wanted, student=None, say=say)


def with_a_trial(found: Search, few: float = 0.5) -> Search:
    """The search with its baseline and one drawn trial complete."""
    study = open_study(open_storage(None, found.folder.root), found.options.study, found.space)
    for _ in range(2):
        trial = study.ask()
        found.space.settings(trial)
        trial.set_user_attr("figures", {found.space.metrics[0]: few})
        trial.set_user_attr("epochs", 2)
        study.tell(trial, few)
    return found


def test_search_refused_for_its_storage_leaves_nothing_that_blocks_the_next(
    data: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    opened(data, tmp_path / "first", storage=url, study="same")
    with pytest.raises(ConfigError, match=r"holds a study same already.*--study"):
        opened(data, tmp_path / "second", storage=url, study="same")
    with pytest.raises(ConfigError, match="does not exist; make it"):
        opened(data, tmp_path / "second", storage=f"sqlite:///{tmp_path}/nowhere/studies.db")
    with pytest.raises(ConfigError, match="expected sqlite:///FILE"):
        opened(data, tmp_path / "second", storage="nonsense")
    assert not (tmp_path / "second").exists()
    opened(data, tmp_path / "second", storage=url, study="other")
    inside = tmp_path / "third"
    assert opened(data, inside, storage=f"sqlite:///{inside}/own.db").folder.record.is_file()


def test_search_refused_for_its_earlier_one_leaves_nothing(data: Path, tmp_path: Path) -> None:
    opened(data, tmp_path / "first")
    with pytest.raises(ConfigError, match="it searched for val/few, this space has METRIC val/balanced"):
        opened(data, tmp_path / "second", BALANCED, earlier=str(tmp_path / "first"))
    with pytest.raises(RunError, match="is not a search directory"):
        opened(data, tmp_path / "second", earlier=str(tmp_path))
    assert not (tmp_path / "second").exists()
    with pytest.raises(RunError, match="holds a search already"):
        opened(data, tmp_path / "first")


def test_changed_copy_of_a_space_begins_from_the_first_ones_trials(data: Path, tmp_path: Path) -> None:
    with_a_trial(opened(data, tmp_path / "first"))
    said: list[str] = []
    opened(data, tmp_path / "wider", SPACE.replace("10.0", "20.0"), said, earlier=str(tmp_path / "first"))
    renamed = SPACE.replace("loss.lrd.weight", "loss.lrd.temperature").replace("0.1", "1.0")
    opened(data, tmp_path / "renamed", renamed, said, earlier=str(tmp_path / "first"))
    assert "1 finished trial(s) added" in said[0]
    assert "0 finished trial(s) added, 0 best queued" in said[1]
    assert "exactly this space's parameters" in said[1]


def test_store_must_hold_the_views_of_the_confirmation_too(data: Path, tmp_path: Path) -> None:
    teacher = {"weights": str(data / "teacher.safetensors"), "disk_bytes": 8 << 20}
    more = {"teacher": teacher, "views": {"cycle": None}, "train": {"epochs": 2000}}
    config = config_of(data, tmp_path / "search", **more)
    (tmp_path / "space.py").write_text(SPACE)
    short = SearchOptions(trials=3, epochs=2)
    confirmed = SearchOptions(trials=3, epochs=2, confirm_seeds=(0,))
    with pytest.raises(ResourceError, match=r"2000 view.*epoch of the confirmation.*teacher.disk_bytes is"):
        new_search(config, tmp_path / "space.py", confirmed, student=None, say=print)
    assert not (tmp_path / "search").exists()
    new_search(config, tmp_path / "space.py", short, student=None, say=print)
    with pytest.raises(ResourceError, match="epoch of the confirmation"):
        resumed_search(tmp_path / "search", confirm_seeds=(0,))


@contextmanager
def _no_cluster(_: Any) -> Iterator[None]:
    yield


def played(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[str]:
    """Plays cluster, trials and report; returns what was called."""
    calls: list[str] = []

    def trials(found: Search, _: Any) -> dict[str, Any]:
        calls.append("trials")
        found.folder.trials_csv.write_text("number\n")
        if error is not None:
            raise error
        return {"best": None}

    def report(_: Path) -> None:
        calls.append("report")
        if error is not None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(search, "connected", _no_cluster)
    monkeypatch.setattr(search, "_run_trials", trials)
    monkeypatch.setattr(search, "build_search_report", report)
    return calls


def test_report_that_cannot_be_written_does_not_hide_why_the_search_ended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = opened(data, tmp_path / "search")
    calls = played(monkeypatch, ResourceError("the real reason"))
    with caplog.at_level(logging.WARNING), pytest.raises(ResourceError, match="the real reason"):
        run_search(found, print)
    assert calls == ["trials", "report"]
    assert "No space left on device" in caplog.text


def test_interrupted_search_ends_at_once_without_a_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(data, tmp_path / "search")
    calls = played(monkeypatch, Interrupted("stopped by SIGINT"))
    with pytest.raises(Interrupted, match=r"stopped by SIGINT; finished trials are kept.*--resume"):
        run_search(found, print)
    assert calls == ["trials"]


def test_second_driver_of_a_search_is_refused_before_it_touches_anything(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_dir, "LOCK_WAIT_S", 0.0)
    found = opened(data, tmp_path / "search")
    calls = played(monkeypatch)
    second = resumed_search(tmp_path / "search", trials=9)
    with found.folder.hold(), pytest.raises(RunError, match=r"another .*krd tune.* works on .*search"):
        run_search(second, print)
    assert calls == []
    assert found.folder.options().trials == 3, "the other driver's"
    assert run_search(second, print)["options"]["trials"] == 9
    assert calls == ["trials", "report"]


def test_resumed_search_remembers_what_it_was_last_asked_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(data, tmp_path / "search", confirm_seeds=(0, 1), at_once=4)
    played(monkeypatch)
    run_search(resumed_search(tmp_path / "search", at_once=1, confirm_seeds=()), print)
    options = resumed_search(tmp_path / "search").options
    assert (options.trials, options.at_once, options.confirm_seeds) == (3, 1, ())


@pytest.mark.parametrize(
    ("asked", "last", "now", "expected"), [(None, 3, 2, 2), (4, 3, 8, 4), (None, 3, 0, 1)]
)
def test_confirmation_takes_as_many_places_as_the_cluster_has_now(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    last: int,
    now: int,
    expected: int,
) -> None:
    found = opened(data, tmp_path / "search", confirm_seeds=(0,), at_once=asked)
    played(monkeypatch)
    record = {"best": {"number": 1, "settings": {}, "baseline": False}, "at_once": last}
    monkeypatch.setattr(search, "_run_trials", lambda *_: record)
    monkeypatch.setattr(search, "check_and_choose_cache", lambda *_: True)
    monkeypatch.setattr(search, "places_for_trials", lambda *_, **__: now)
    told: dict[str, Any] = {}
    monkeypatch.setattr(search, "confirm_best", lambda *_, **how: told.update(how))
    run_search(found, print)
    assert told["at_once"] == expected


def test_interrupted_confirmation_goes_on_with_what_is_asked_for_now(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(data, tmp_path / "search")
    found.folder.add(best={"number": 1, "settings": {"loss.lrd.weight": 2.0}})
    root = found.folder.confirmation(1)
    outcome = type("Outcome", (), {"failed": [], "num_trained": 0})()
    tested: list[bool] = []

    def begin(wanted: RunConfig) -> Any:
        root.mkdir(parents=True)
        search_dir.write_text(root / "config.yaml", search_dir.dump_config(wanted))
        return outcome

    def evaluate(folder: Path, *, again: bool) -> None:
        tested.append(again)
        names = [student.name for student in load_config(folder / "config.yaml").students]
        (folder / "evaluation.json").write_text(json.dumps({"models": {name: {} for name in names}}))

    monkeypatch.setattr(confirm, "start_run", begin)
    monkeypatch.setattr(confirm, "resume_run", lambda _: outcome)
    monkeypatch.setattr(confirm, "evaluate_run", evaluate)
    monkeypatch.setattr(confirm, "build_report", lambda _: None)
    for seeds, at_once in (((0,), 4), ((0,), 1), ((0, 1), 1)):
        confirm.confirm_best(found.config, found.folder, seeds=seeds, at_once=at_once, say=print)
    config = load_config(root / "config.yaml")
    assert config.students_at_once == 1
    assert [student.name for student in config.students] == [
        "baseline.s0",
        "best.s0",
        "baseline.s1",
        "best.s1",
    ]
    assert tested == [True, False, True], "read again only for students that were never tested"


def test_refused_search_says_so_with_an_error_for_people(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "search"
    opened(data, root)
    SearchDir(root).record.unlink()
    with pytest.raises(KrdError, match=r"study.log.*was being made.*remove"):
        opened(data, root)
