"""Answers how a file is written so that nobody ever finds half of it: beside its name, to the disk, then renamed.

Does not know what is written. A process that is killed leaves the old file or the new one under the name, and at
most one `.partial` file beside it. The same holds for a power failure: content reaches the disk before the name does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file in one step by what `write` puts into another one of the same folder.

    Args:
        path: of the file; its folder is made where it is missing.
        write: gets the path to write to and closes it again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file's content in one step."""
    write_file(path, lambda partial: partial.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file, UTF-8, in one step."""
    write_bytes(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power failure."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
