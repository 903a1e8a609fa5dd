"""Answers how a file is written so that nobody ever finds half of it: beside its name, to the disk, then renamed.

Does not know what is written. A process that is killed leaves the old file or the new one under the name, and at
most one `.partial` file beside it. The same holds for a power failure: content reaches the disk before the name does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from krd_ray.errors import DiskFullError

FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another file of the same folder to write to, and puts it into the place of the file when the block ends.

    Args:
        path: of the file; its folder is made where it is missing.
    Raises:
        DiskFullError: there is no room for it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file in one step by what `write` puts into the path that it is given."""
    with replacing(path) as partial:
        write(partial)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file's content in one step."""
    write_file(path, lambda partial: partial.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file, UTF-8, in one step."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turns a full disk, met in the block, into an error that says which file found no room.

    Libraries that wrap the system's error in one of their own (safetensors) keep its words.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) and error.errno in FULL) and os.strerror(errno.ENOSPC) not in str(
            error
        ):
            raise
        raise DiskFullError(
            f"cannot write {path}: {os.strerror(errno.ENOSPC)}; free space there, what was written before is intact"
        ) from error


def sync(path: Path) -> None:
    """Makes a file's content, or the renames inside a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
