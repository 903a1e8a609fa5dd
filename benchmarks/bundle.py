"""Answers how this project reaches a machine with torch and a GPU but without a package index: one folder of wheels.

Does not install anything; `benchmarks/gpu.sh` does, and runs every check that needs a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.entry import run_command
from krd_ray.errors import RunError

ROOT = Path(__file__).parent.parent
# What an image with torch, torchvision, pyarrow and their like usually lacks.
MISSING = (
    "ray", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "optuna", "colorlog", "rich",
    "tensorboardX", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "cloudpickle",
)  # fmt: skip
# Half of Ray's wheel: Java, the dashboard's front end, and libraries that nothing here imports.
NOT_NEEDED = (
    "ray/jars/",
    "ray/dashboard/client/",
    "ray/rllib/",
    "ray/serve/",
    "ray/llm/",
    "ray/core/libjemalloc",
)
GLIBC = (28, 27, 17)


def main(
    folder: Annotated[Path, typer.Argument(help="where the wheels go; carry it to the machine")],
    package: Annotated[
        list[str] | None, typer.Option(help="instead of the usual ones; may be repeated")
    ] = None,
    python: Annotated[str, typer.Option(help="Python of that machine")] = "3.12",
) -> None:
    """Download wheels for x86-64 Linux in the versions of requirements.lock, Ray's stripped, and build krd_ray's.

    There, from the root of the repository: benchmarks/gpu.sh FOLDER RESULTS
    """
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    wanted = [locked[name.lower()] for name in package or MISSING]
    with tempfile.TemporaryDirectory() as temporary:
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
        only = [
            "--no-deps",
            "--only-binary=:all:",
            f"--python-version={python}",
            "--platform=manylinux2014_x86_64",
        ]
        _pip("download", *only, *platforms, "-d", temporary, *wanted)
        _pip("wheel", "--no-deps", "--no-build-isolation", "-w", temporary, str(ROOT))
        folder.mkdir(parents=True, exist_ok=True)
        for wheel in sorted(Path(temporary).glob("*.whl")):
            _copy(wheel, folder / wheel.name, NOT_NEEDED if wheel.name.startswith("ray-") else ())
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    typer.echo(f"{len(wanted) + 1} wheels, {total / 1e6:.0f} MB, in {folder}")


def _pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=False).returncode:
        raise RunError(f"pip {arguments[0]} failed; its message stands above")


def _copy(wheel: Path, target: Path, without: tuple[str, ...]) -> None:
    """A wheel without some of its files; its RECORD names only those that are left."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for item in source.infolist():
            if item.filename.startswith(without):
                continue
            content = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                kept = [line for line in content.decode().splitlines() if not line.startswith(without)]
                content = "\n".join([*kept, ""]).encode()
            copy.writestr(item, content)


if __name__ == "__main__":
    run_command(main)
