"""Answers how what Ray Train keeps of a student is written whole or not at all: a file system for its storage.

Does not know what is kept. Ray Train writes its list of checkpoints over the old list: a process that is killed then
leaves half of one, which nothing can be resumed from. On this file system a file appears when it is closed, and
replaces the old one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler, PyFileSystem

from krd_ray.atomic import sync_folder


class _WholeFile:
    """A file open for writing; it takes its name when it is closed, unless a write has failed."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        self._failed = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError:
            self._failed = True
            raise

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if not self._failed:
                os.replace(self._partial, self._path)
                sync_folder(self._path.parent)
        finally:
            self._partial.unlink(missing_ok=True)


class _Handler(FSSpecHandler):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(LocalFileSystem())

    def __reduce__(self) -> tuple[type[_Handler], tuple[()]]:
        return (type(self), ())

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:
        del metadata  # of object stores
        return PythonFile(_WholeFile(path), mode="w")


def whole_files() -> PyFileSystem:
    """Returns this machine's files, written as said above; paths are ordinary absolute ones."""
    return PyFileSystem(_Handler())
