"""Answers whether every example in the package's docstrings runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import krd_ray

MODULES = sorted(module.name for module in pkgutil.walk_packages(krd_ray.__path__, "krd_ray."))
EXAMPLE_LINE = re.compile(r"^\s*>>> ", re.MULTILINE)
ran: dict[str, int] = {}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    source = Path(module.__file__ or "").read_text()
    assert "+SKIP" not in source
    assert result.attempted == len(EXAMPLE_LINE.findall(source)), "an example was not found"
    ran[name] = result.attempted


def test_no_module_was_left_out() -> None:
    files = [path for path in Path(krd_ray.__file__).parent.rglob("*.py") if path != Path(krd_ray.__file__)]
    assert len(MODULES) == len(files)


def test_there_are_examples_worth_running() -> None:
    if ran.keys() != set(MODULES):
        pytest.skip("only some of the modules were chosen in this session")
    assert sum(ran.values()) > 100
