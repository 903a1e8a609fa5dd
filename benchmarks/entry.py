"""Answers how a benchmark's command ends: an error that is meant for people is printed without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from krd_ray.errors import KrdError


def run_command(main: Callable[..., None]) -> None:
    """Runs a typer function as a command; a KrdError becomes one line and exit code 1."""
    try:
        typer.run(main)
    except KrdError as error:
        typer.echo(f"error: {error.message}", err=True)
        sys.exit(1)
