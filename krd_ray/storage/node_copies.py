"""Answers how a file at a URI becomes one that this node can map: copied once, checked, shared by its processes.

Does not follow changes: a file that changes at its place is another copy. Nothing is removed; KRD_SCRATCH says where
copies lie, and may be emptied whenever no run is at work.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from krd_ray.atomic import replacing
from krd_ray.errors import DataError, StorageError
from krd_ray.storage.places import Folder, is_uri, join, split

SCRATCH = "KRD_SCRATCH"  # a matter of the node, not of the run: nodes of one cluster have different disks


def scratch_folder(*names: str) -> Path:
    """Returns a folder on this node's own disk, made where it is missing.

    It lies in $KRD_SCRATCH, or in a folder of this user's among the temporary files.

    Raises:
        StorageError: it belongs to somebody else, or cannot be made.
    """
    root = Path(os.environ.get(SCRATCH) or Path(tempfile.gettempdir()) / f"krd_ray-{os.getuid()}").absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise StorageError(f"{root} belongs to another user; set {SCRATCH} to a folder of your own")
        folder = root.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {root.joinpath(*names)} ({error.strerror}); set {SCRATCH} to a folder on a disk with space"
        ) from error
    return folder


def node_folder(place: str) -> Path:
    """Returns the folder of this node that stands for a place: the place itself, or for a URI one of its own."""
    if not is_uri(place):
        return Path(place)
    return scratch_folder("folders", f"{split(place)[1]}-{_name_of(place)}")


def node_file(place: str, *, sha256: str | None = None) -> Path:
    """Returns a file as one on this node: the place itself, or a copy of what lies at the URI now.

    Args:
        place: path or URI.
        sha256: what the file's content must be; the same content from another place is not copied again.
    Raises:
        StorageError: it cannot be copied.
        DataError: it has another checksum.
    """
    if not is_uri(place):
        return Path(place)
    above, name = split(place)
    folder = Folder.at(above)
    key = sha256 or _name_of(f"{place} {_version_of(folder, name)}")
    path = scratch_folder("files", key) / name
    with alone(path.with_name(f"{name}.lock")):
        if not path.is_file():
            _copy(folder, name, path, sha256)
    return path


@contextmanager
def writing(place: str) -> Iterator[Path]:
    """A file of this node to write to; it appears at its place whole, when the block ends without an error."""
    if not is_uri(place):
        with replacing(Path(place)) as partial:
            yield partial
        return
    above, name = split(place)
    with tempfile.TemporaryDirectory(dir=scratch_folder("work")) as folder:
        yield Path(folder) / name
        Folder.at(above).put(Path(folder) / name, name)


def exists(place: str) -> bool:
    """Returns whether there is such a file."""
    if not is_uri(place):
        return Path(place).is_file()
    above, name = split(place)
    return Folder.at(above).version(name) is not None


def _version_of(folder: Folder, name: str) -> str:
    version = folder.version(name)
    if version is None:
        raise StorageError(f"{join(folder.place, name)} does not exist; check the address")
    return str(version)


def _copy(folder: Folder, name: str, path: Path, sha256: str | None) -> None:
    fetched = path.with_name(f"{name}.fetched")
    folder.get(name, fetched)
    if sha256 is not None:
        found = sha256_of(fetched)
        if found != sha256:
            fetched.unlink()
            raise DataError(
                f"{join(folder.place, name)} has another checksum than dataset.json says: its content changed or "
                "came damaged; copy it there again, or write the shards again with `krd shards`, overwriting them"
            )
    os.replace(fetched, path)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this node at a time, by a lock file; the lock goes with a process that dies."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """Returns the checksum of a file on this node, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
