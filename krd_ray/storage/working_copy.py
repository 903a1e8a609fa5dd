"""Answers how a process works in a folder that lies at a URI: in a copy of its own, kept equal in both directions.

Does not merge: every file has one writer, and whoever works in the folder may read what the others have written. For
a place that is a folder of this node already, the copy is that folder and there is nothing to do.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from krd_ray.errors import KrdError, StorageError
from krd_ray.storage.node_copies import scratch_folder
from krd_ray.storage.places import Folder, Version, absolute, is_uri, join, split

EVERY_S = 5.0
BUSY_FRAC = 0.1  # of the time, at most, goes into keeping copies equal: a file that has grown goes as a whole
PARTIAL = ".partial"
# What its one user reads where it lies, or copies itself: in a run's folder, in a teacher's.
LEFT = ("students/*/checkpoints/*", "students/*/ray_train/*", "teacher/store/*", "store/*", "archives/*")
log = logging.getLogger(__name__)


class WorkingCopy:
    """A folder of this node that stands for a place.

    Args:
        place: path or URI.
        skip: patterns of files that are left where they are, by their names relative to the folder.
    """

    def __init__(self, place: str, *, skip: tuple[str, ...] = LEFT) -> None:
        self.place, self._skip = place, skip
        self._folder: Folder | None = None
        self.path = Path(place)
        if is_uri(place):
            self._folder = Folder.at(place)
            self.path = Path(tempfile.mkdtemp(dir=scratch_folder("work"))) / split(place)[1]
            self.path.mkdir()
        # Files that are the same on both sides, by their versions on this one; and those of them that others write,
        # by their versions on the other side.
        self._here: dict[str, Version] = {}
        self._theirs: dict[str, Version] = {}
        self._lock = threading.Lock()

    @property
    def is_copy(self) -> bool:
        """Returns whether the place is somewhere else."""
        return self._folder is not None

    def place_of(self, path: Path) -> str:
        """Returns where a file of the copy lies for everybody else."""
        return join(self.place, *path.relative_to(self.path).parts)

    def sync(self) -> None:
        """Brings what others have written here, and what was written or removed here there.

        Raises:
            StorageError: the place cannot be reached.
        """
        self.pull()
        self.push()

    def pull(self) -> None:
        """Brings what others have written.

        Raises:
            StorageError: the place cannot be reached.
        """
        if self._folder is None:
            return
        with self._lock:
            there = {name: version for name, version in self._folder.files().items() if self._is_kept(name)}
            for name in self._theirs.keys() - there.keys():  # its writer has removed it
                (self.path / name).unlink(missing_ok=True)
                del self._theirs[name], self._here[name]
            for name, version in there.items():
                own = name in self._here and name not in self._theirs
                if not own and self._theirs.get(name) != version:
                    self._folder.get(name, self.path / name)
                    self._here[name], self._theirs[name] = _version(self.path / name), version

    def push(self) -> None:
        """Takes what was written or removed here there, in the order of writing.

        Raises:
            StorageError: the place cannot be reached.
        """
        if self._folder is None:
            return
        with self._lock:
            here = self._files_here()
            for name in self._here.keys() - here.keys():
                self._folder.remove(name)
                del self._here[name]
                self._theirs.pop(name, None)
            for name in sorted(here, key=lambda name: here[name][1] or 0):
                if self._here.get(name) != here[name]:
                    self._folder.put(self.path / name, name)
                    self._here[name] = here[name]
                    self._theirs.pop(name, None)

    def discard(self) -> None:
        """Removes the copy from this node."""
        if self._folder is not None:
            shutil.rmtree(self.path.parent, ignore_errors=True)

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Errors that name the copy's folder, which is nobody's business, name the place instead."""
        try:
            yield
        except KrdError as error:
            if self._folder is None or str(self.path) not in error.message:
                raise
            raise type(error)(error.message.replace(str(self.path), self.place)) from error

    def _files_here(self) -> dict[str, Version]:
        found: dict[str, Version] = {}
        for path in self.path.rglob("*"):
            name = path.relative_to(self.path).as_posix()
            try:
                if self._is_kept(name) and path.is_file():
                    found[name] = _version(path)
            except FileNotFoundError:  # renamed or removed since
                continue
        return found

    def _is_kept(self, name: str) -> bool:
        return not name.endswith(PARTIAL) and not any(fnmatchcase(name, pattern) for pattern in self._skip)


@contextmanager
def working_copy(
    place: str | Path, *, every_s: float = EVERY_S, skip: tuple[str, ...] = LEFT
) -> Iterator[WorkingCopy]:
    """A working copy for the time of the block, kept equal in the background and once more at its end.

    Args:
        place: path or URI.
        every_s: seconds between two looks.
        skip: as for `WorkingCopy`.
    Raises:
        StorageError: the place cannot be reached at the beginning or at the end; what was written last then stays
            on this node, and the message says where.
    """
    copy = WorkingCopy(absolute(place), skip=skip)
    copy.pull()
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(copy, ended, every_s), name="working-copy", daemon=True)
    if copy.is_copy:
        keeper.start()
    try:
        with copy.errors_named():
            yield copy
    finally:
        ended.set()
        if copy.is_copy:
            keeper.join()
        _finish(copy)


def _finish(copy: WorkingCopy) -> None:
    try:
        copy.push()
    except StorageError as error:
        raise StorageError(f"{error.message}. What could not be written lies in {copy.path}") from error
    copy.discard()


def _keep(copy: WorkingCopy, ended: threading.Event, every_s: float) -> None:
    pause_s = 0.0
    while not ended.wait(pause_s):
        started = time.monotonic()
        try:
            copy.sync()
        except StorageError as error:
            log.warning("%s; trying again", error.message)
        pause_s = max(every_s, (time.monotonic() - started) / BUSY_FRAC)


def _version(path: Path) -> Version:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
