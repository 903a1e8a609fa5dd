"""Every command that the README and the configs' headers show parses, and every file they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from krd_ray.cli import app
from krd_ray.config_io import load_config

ROOT = Path(__file__).parents[2]


def commands_in(text: str) -> list[list[str]]:
    """The `krd ...` lines of a text, submitted jobs too, continued lines joined, trailing comments dropped."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    lines = [line.lstrip("# ").rpartition(" -- ")[2].strip() for line in joined.splitlines()]
    parts = [part.strip() for line in lines if line.startswith("krd ") for part in line.split("&&")]
    return [shlex.split(part, comments=True)[1:] for part in parts]


def shown() -> list[list[str]]:
    texts = [
        (ROOT / "README.md").read_text(),
        (ROOT / "cluster/README.md").read_text(),
        *(path.read_text() for path in sorted(ROOT.glob("configs/*.yaml"))),
    ]
    return [words for text in texts for words in commands_in(text)]


def test_the_documents_show_commands() -> None:
    assert len(shown()) >= 15
    assert len(commands_in((ROOT / "cluster/README.md").read_text())) >= 1


@pytest.mark.parametrize("words", shown(), ids=" ".join)
def test_shown_command_parses_and_its_config_takes_its_settings(words: list[str]) -> None:
    verb, *arguments = words
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    context = command.make_context(verb, arguments)
    config = context.params.get("config")
    if config is not None:
        load_config(ROOT / config, context.params.get("settings") or ())


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets
