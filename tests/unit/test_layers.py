"""Answers whether the code keeps to its layers and sizes, as docs/design.md draws them.

Reads sources without importing them, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "krd_ray"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
INPUT_OUTPUT = {
    "io",
    "os",
    "pathlib",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "tempfile",
    "urllib",
    "http",
}


@dataclass(frozen=True)
class Layer:
    """What the files of a layer may import besides the standard library and themselves."""

    own: frozenset[str]
    outside: frozenset[str]
    forbidden_stdlib: frozenset[str] = frozenset()


def layer(own: str, outside: str, forbidden_stdlib: set[str] | None = None) -> Layer:
    return Layer(frozenset(own.split()), frozenset(outside.split()), frozenset(forbidden_stdlib or ()))


SETTINGS = "errors config config_loss config_resources config_io"
NUMERIC = "torch numpy"
LAYERS = {
    "": layer("", ""),
    "errors": layer("", ""),
    "atomic": layer("errors", ""),
    "config_loss": layer("errors", "pydantic"),
    "config_resources": layer("errors config_loss", "pydantic"),
    "config": layer("errors config_loss config_resources", "pydantic"),
    "config_io": layer("errors config config_loss config_resources", "pydantic pydantic_core yaml"),
    "storage": layer("atomic errors", "pyarrow fsspec"),
    "maths": layer("errors", f"{NUMERIC} scipy", INPUT_OUTPUT),
    "models": layer("errors", f"{NUMERIC} torchvision"),
    "data": layer(
        "atomic errors storage maths models", f"{NUMERIC} torchvision pyarrow ray pydantic PIL sklearn"
    ),
    "teacher": layer(
        f"atomic {SETTINGS} storage maths models data", f"{NUMERIC} safetensors ray pyarrow psutil"
    ),
    "train": layer(
        f"atomic {SETTINGS} storage maths models data teacher",
        f"{NUMERIC} safetensors ray rich psutil",
    ),
    "report": layer("atomic errors storage", "matplotlib jinja2 numpy yaml rich"),
    "tune": layer(
        f"atomic {SETTINGS} storage maths models data teacher train report",
        f"{NUMERIC} ray optuna pydantic rich yaml",
    ),
    "doctor": layer(f"{SETTINGS} storage data train", "ray rich pyarrow psutil torch"),
    "demo": layer(f"{SETTINGS} storage maths models data teacher train tune report", ""),
    "cli": layer(
        f"{SETTINGS} storage maths models data teacher train tune report demo doctor", "typer click"
    ),
}


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all imported modules; `from krd_ray.a import b` gives krd_ray.a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_source_file_is_found_and_lies_in_a_known_layer() -> None:
    assert len(SOURCES) >= 70
    assert {layer_of(path) for path in SOURCES} <= LAYERS.keys()
    assert {"maths", "models", "data", "teacher", "train", "tune", "report", "cli", "demo"} <= {
        layer_of(path) for path in SOURCES
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_imports_only_what_its_layer_may(path: Path) -> None:
    own = layer_of(path)
    rule = LAYERS[own]
    for name in sorted(imports_of(ast.parse(path.read_text()))):
        package, *rest = name.split(".")
        if package == "krd_ray":
            assert rest, "`import krd_ray` says nothing about the layer"
            assert rest[0] in rule.own | {own}, f"layer {own!r} may not import {name}"
        elif package in sys.stdlib_module_names:
            assert package not in rule.forbidden_stdlib, f"layer {own!r} does no I/O, but imports {name}"
        else:
            assert package in rule.outside, f"layer {own!r} may not import {name}"


def test_rule_is_broken_by_an_import_inside_a_function() -> None:
    tree = ast.parse(
        "def f():\n    if True:\n        from krd_ray.train import run\n        import ray.data\n"
    )
    assert imports_of(tree) == {"krd_ray.train.run", "ray.data"}


def test_layers_have_no_circle() -> None:
    rank = {name: position for position, name in enumerate(LAYERS)}
    for name, rule in LAYERS.items():
        assert all(rank[below] < rank[name] for below in rule.own), name


def test_command_line_imports_nothing_of_the_package_before_a_verb_needs_it() -> None:
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    packages = {name.split(".")[0] for name in imports_of(at_top)}
    assert packages - sys.stdlib_module_names == {"typer"}


def run_help(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )


HELP = "import sys; sys.argv = ['krd', '--help']; from krd_ray.cli import main\ntry: main()\nexcept SystemExit: pass"


def test_help_lists_the_verbs_and_imports_neither_torch_nor_ray() -> None:
    heavy = "('torch', 'ray', 'optuna', 'numpy', 'pyarrow', 'matplotlib', 'pydantic', 'rich')"
    done = run_help(f"{HELP}\nprint('heavy:', [m for m in {heavy} if m in sys.modules])")
    *text, heavy_line = done.stdout.splitlines()
    for verb in ("shards", "teacher", "distill", "tune", "evaluate", "report", "demo", "models", "doctor"):
        assert any(line.split()[:1] == [verb] for line in text), verb
    assert heavy_line == "heavy: []"


def test_help_is_quick() -> None:
    took_s = []
    for _ in range(5):
        started = time.perf_counter()
        run_help(HELP)
        took_s.append(time.perf_counter() - started)
        if took_s[-1] < 0.4:
            break
    assert min(took_s) < 0.4, took_s


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_and_its_functions_are_short_enough(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if node.name in DECLARATIONS.get(path.name, ()):
                lines = node.end_lineno - node.body[0].lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


# Functions whose signature is a declaration (command-line options, one a line): only their bodies count.
DECLARATIONS = {"cli.py": ("shards", "tune")}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stat().st_size > 0], ids=name_of)
def test_file_says_first_what_it_answers(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring is not None
    assert len(docstring.splitlines()[0]) > 20
