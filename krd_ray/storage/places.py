"""Answers what a place is, a folder or a URI like `s3://bucket/folder`, and reads, writes and lists files there.

Does not keep copies (`node_copies`, `working_copy`). NFS and other mounted file systems are plain folders.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
from pyarrow import fs

from krd_ray.errors import ConfigError, StorageError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
ONE_SLASH = re.compile(
    r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/+"
)  # what is left of a URI that was taken for a path
PUTS_ARE_ATOMIC = ("s3", "gcs", "abfs")  # elsewhere a file is written beside its name, then moved there
CHUNK_BYTES = 16 << 20
FULL = "free space there; copies of this node lie in $KRD_SCRATCH, by default among the temporary files"
Version = tuple[int, int | None]  # size in bytes, time of the last change in ns


def is_uri(place: str | os.PathLike[str]) -> bool:
    """Returns whether a place is a URI.

    Example:
        >>> is_uri("s3://bucket/shards"), is_uri("runs/first"), is_uri("C:/shards")
        (True, False, False)
    """
    return SCHEME.match(str(place)) is not None


def absolute(place: str | os.PathLike[str]) -> str:
    """Returns a place by its full name: a URI as it is, a folder's absolute path.

    Raises:
        ConfigError: a URI with one slash, or with a password in it.

    Example:
        >>> absolute("s3://bucket/shards/")
        's3://bucket/shards'
    """
    text = str(place)
    if is_uri(text):
        if urlsplit(text).password is not None:
            raise ConfigError(
                f"{urlsplit(text).scheme}://... has a password in it, which a run would write into its files; give "
                "credentials to every node instead: a role, or variables such as AWS_ACCESS_KEY_ID"
            )
        return text.rstrip("/")
    if ONE_SLASH.search(text):
        raise ConfigError(
            f"{text} is neither a folder nor a URI; a URI has two slashes, as in s3://bucket/folder"
        )
    return str(Path(text).expanduser().resolve())


def require_folder(place: str | os.PathLike[str], what: str) -> Path:
    """Returns the absolute path of a folder or file that cannot lie at a URI.

    Args:
        place: as it was given; a URI that has been made a `Path` is known too.
        what: the setting, for the message.
    Raises:
        ConfigError: it is a URI.
    """
    uri = ONE_SLASH.search(str(place))
    if uri is not None:
        raise ConfigError(
            f"{what} is {uri[1]}://{str(place)[uri.end() :]}, but has to be on this machine or on a file system that "
            "all nodes mount (NFS, EFS, Filestore); URIs are for data.dir, teacher.weights, teacher.spill_dir, the "
            "run_dir of `krd teacher` and `krd distill`, and the folder of `krd shards`"
        )
    return Path(place).expanduser().resolve()


def join(place: str, *names: str) -> str:
    """Returns a place below a place; a URI's `?options` stay at its end.

    Example:
        >>> join("s3://bucket/run?region=eu-west-1", "students", "small")
        's3://bucket/run/students/small?region=eu-west-1'
    """
    if not is_uri(place):
        return str(Path(place, *names))
    path, mark, options = place.partition("?")
    return "/".join([path.rstrip("/"), *names]) + mark + options


def split(place: str) -> tuple[str, str]:
    """Returns the place above and the last name.

    Example:
        >>> split("s3://bucket/run/teacher.safetensors?region=eu-west-1")
        ('s3://bucket/run?region=eu-west-1', 'teacher.safetensors')
    """
    path, mark, options = place.partition("?") if is_uri(place) else (place, "", "")
    above, _, name = path.rstrip("/").rpartition("/")
    return above + mark + options, name


@dataclass(frozen=True)
class Folder:
    """A folder on some file system.

    Args:
        system: the file system.
        path: of the folder there.
        place: as people write it.
    """

    system: fs.FileSystem
    path: str
    place: str

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> Folder:
        """Opens a place; nothing is made there.

        Raises:
            StorageError: no such kind of file system, or it cannot be reached.
        """
        if is_uri(place):
            return _open(str(place))
        return cls(fs.LocalFileSystem(), str(Path(place).expanduser().absolute()), str(place))

    def files(self) -> dict[str, Version]:
        """Returns all files below, by their names relative to the folder; none where there is no such folder."""
        with self._told("list"):
            selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
            found = self.system.get_file_info(selector)
        base = PurePosixPath(self.path)
        return {
            str(PurePosixPath(info.path).relative_to(base)): (info.size, info.mtime_ns)
            for info in found
            if info.type == fs.FileType.File
        }

    def version(self, name: str) -> Version | None:
        """Returns size and time of a file, None where there is none."""
        with self._told("look at", name):
            info = self.system.get_file_info(self._at(name))
        return (info.size, info.mtime_ns) if info.type == fs.FileType.File else None

    def open(self, name: str) -> Any:
        """Opens a file for reading at any position; what is not asked for is not transferred.

        Raises:
            FileNotFoundError: no such file.
            OSError: it cannot be read.
        """
        return self.system.open_input_file(self._at(name))

    def get(self, name: str, to: Path) -> None:
        """Copies a file to this node; under its name there it is whole or absent.

        Raises:
            StorageError: it cannot be read, or not be written here.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f"{to.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with self._told("read", name):
                fs.copy_files(
                    self._at(name),
                    str(partial),
                    source_filesystem=self.system,
                    destination_filesystem=fs.LocalFileSystem(),
                    chunk_size=CHUNK_BYTES,
                )
            os.replace(partial, to)
        finally:
            partial.unlink(missing_ok=True)

    def put(self, source: Path, name: str) -> None:
        """Copies a file of this node there; a reader sees the old one or the new one, never half of it.

        Raises:
            StorageError: it cannot be written.
        """
        target = self._at(name)
        direct = self.system.type_name in PUTS_ARE_ATOMIC
        to = f"{target}.{uuid.uuid4().hex[:8]}.partial"
        with self._told("write", name):
            if direct:
                self._upload(source, target)
                return
            self.system.create_dir(str(PurePosixPath(target).parent), recursive=True)
            try:
                self._upload(source, to)
                self.system.move(to, target)
            except BaseException:
                if self.system.get_file_info(to).type == fs.FileType.File:
                    self.system.delete_file(to)
                raise

    def remove(self, name: str) -> None:
        """Removes a file; it may be gone already."""
        with self._told("remove", name):
            if self.version(name) is not None:
                self.system.delete_file(self._at(name))

    def _upload(self, source: Path, target: str) -> None:
        fs.copy_files(
            str(source),
            target,
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.system,
            chunk_size=CHUNK_BYTES,
            use_threads=False,  # several threads that upload to S3 can wait for each other (apache/arrow#32372)
        )

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextmanager
    def _told(self, verb: str, name: str | None = None) -> Iterator[None]:
        """An error of the file system as one for people."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            what = self.place if name is None else join(self.place, name)
            remedy = FULL if getattr(error, "errno", None) == errno.ENOSPC else _remedy(self.place)
            raise StorageError(f"cannot {verb} {what}: {_first_line(error)}; {remedy}") from error


@functools.lru_cache(maxsize=256)  # a file system that is made anew asks S3 for the bucket's region each time
def _open(place: str) -> Folder:
    try:
        system, path = fs.FileSystem.from_uri(place)
    except pa.ArrowInvalid:  # a kind of file system that Arrow has no code of its own for
        system, path = _open_by_fsspec(place)
    except OSError as error:
        raise StorageError(f"cannot open {place}: {_first_line(error)}; {_remedy(place)}") from error
    return Folder(system, path.rstrip("/"), place)


def _open_by_fsspec(place: str) -> tuple[fs.FileSystem, str]:
    try:
        system, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(
            f"cannot open {place}: {_first_line(error)}; s3://, gs://, abfs:// and file:// need nothing more, others "
            "need their fsspec package on every node"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(system)), str(path)


def _remedy(place: str) -> str:
    if not is_uri(place):
        return "check the folder's permissions and free space"
    return "check the address, and that this node has credentials for it and reaches it"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
