"""What `krd tune` makes of its words: which go together, and which a resumed search would have ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from krd_ray.cli import app
from krd_ray.config_io import parse_config
from krd_ray.errors import ConfigError
from krd_ray.tune import command
from krd_ray.tune.command import Asked, open_search, seeds_of
from krd_ray.tune.search_dir import SearchDir, SearchOptions
from krd_ray.tune.space import load_space
from tests.unit.run_builders import raw_run

SPACE = 'METRIC = "val/few"\nMODE = "max"\n\n\ndef space(trial):\n    trial.suggest_float("loss.kd.weight", 0, 1)\n'


@pytest.fixture
def search(tmp_path: Path) -> Path:
    (tmp_path / "space.py").write_text(SPACE)
    options = SearchOptions(8, 4, at_once=2, confirm_seeds=(5, 6))
    SearchDir(tmp_path / "search").create(options, load_space(tmp_path / "space.py"), parse_config(raw_run()))
    return tmp_path / "search"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the search."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(command, "load_config", lambda *_: None)
    monkeypatch.setattr(command, "new_search", lambda *words, **_: found.update(options=words[2]))
    monkeypatch.setattr(command, "resumed_search", lambda _, **changes: found.update(changes))
    return found


def opened(
    asked: Asked, *, resume: Path | None = None, config: Path | None = None, space: Path | None = None
) -> None:
    open_search(config, space, asked, (), student=None, resume=resume, say=print)


def test_search_needs_a_config_and_a_space_or_a_search_that_goes_on() -> None:
    with pytest.raises(ConfigError, match="give a config file and --space FILE, or --resume"):
        opened(Asked())


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (Asked(epochs=0), "--epochs"),
        (Asked(seed=0), "--seed"),
        (Asked(storage="sqlite:///a.db"), "--storage"),
        (Asked(study="s"), "--study"),
        (Asked(prune=True), "--prune"),
        (Asked(prune=False), "--no-prune"),
        (Asked(grace_epochs=1), "--grace-epochs"),
        (Asked(earlier=Path("old")), "--from"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_refuses_by_name_what_it_would_ignore(search: Path, asked: Asked, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^--resume .*: {name} cannot change.*--trials, --at-once"):
        opened(asked, resume=search)


def test_resume_refuses_config_space_settings_and_student(search: Path) -> None:
    with pytest.raises(ConfigError, match="CONFIG, --space, --set, --student cannot change"):
        open_search(search, search, Asked(), ["seed=1"], student="s", resume=search, say=print)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Asked(), (None, None, None)),
        (Asked(trials=9, at_once=1), (9, 1, None)),
        (Asked(confirm=False), (None, None, ())),
        (Asked(confirm=True), (None, None, (5, 6))),
        (Asked(confirm_seeds="1 2"), (None, None, (1, 2))),
    ],
)
def test_resume_hands_on_what_is_about_this_session(
    search: Path, called: dict[str, Any], asked: Asked, expected: Any
) -> None:
    opened(asked, resume=search)
    assert (called["trials"], called["at_once"], called["confirm_seeds"]) == expected


def test_resume_with_confirm_of_a_search_without_takes_the_usual_seeds(
    search: Path, called: dict[str, Any]
) -> None:
    options = SearchDir(search).read()["options"]
    SearchDir(search).add(options={**options, "confirm_seeds": []})
    opened(Asked(confirm=True), resume=search)
    assert called["confirm_seeds"] == (0, 1, 2)


def test_new_search_has_defaults_for_what_was_not_said(called: dict[str, Any]) -> None:
    here = Path("here")
    opened(Asked(), config=here, space=here)
    assert called["options"] == SearchOptions(40, 0, grace_epochs=0, confirm_seeds=(0, 1, 2))
    opened(Asked(prune=False, confirm=False, trials=3, earlier=here), config=here, space=here)
    assert called["options"] == SearchOptions(3, 0, grace_epochs=None, confirm_seeds=(), earlier="here")


def test_words_that_contradict_each_other_are_refused() -> None:
    here = Path("here")
    with pytest.raises(ConfigError, match=r"--grace-epochs .* --no-prune"):
        opened(Asked(prune=False, grace_epochs=2), config=here, space=here)
    with pytest.raises(ConfigError, match=r"--confirm-seeds .* --no-confirm"):
        opened(Asked(confirm=False, confirm_seeds="1"), resume=here)
    with pytest.raises(ConfigError, match="expected whole numbers"):
        seeds_of("a b")
    with pytest.raises(ConfigError, match="at least one"):
        seeds_of(" ")


def test_cli_tells_what_was_said_from_what_was_not() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    context = commands["tune"].make_context("tune", ["--resume", "folder"])
    assert {name for name, value in context.params.items() if value} == {"resume"}
