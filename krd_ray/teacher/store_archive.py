"""Answers how a persistent target store lies at a URI between runs: one archive per replica, replaced as a whole.

Does not know what a store holds. A node that uses the store unpacks the archive on its own disk; whoever has computed
more replaces it at the end. Of two runs that do so at the same time the later one's stays: what it lacks is computed
again, nothing in it can be wrong.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import uuid
from pathlib import Path

from krd_ray.storage.node_copies import alone, writing
from krd_ray.storage.places import Folder, is_uri, join
from krd_ray.teacher.spec import TeacherSpec, store_folder

ARCHIVES = "archives"


def fetch_store(spec: TeacherSpec, teacher_hash: str, replica: int) -> None:
    """Unpacks the archive of a replica's store on this node, unless what it has came from there or went there.

    Raises:
        StorageError: the URI cannot be read.
    """
    if not _is_archived(spec):
        return
    folder = store_folder(spec, teacher_hash, replica)
    known = folder.with_name(f"{folder.name}.version")
    with alone(folder.with_name(f"{folder.name}.fetching")):
        version = Folder.at(_archives(spec)).version(f"{folder.name}.tar")
        if version is None or (known.is_file() and known.read_text() == str(version)):
            return
        _unpack(Folder.at(_archives(spec)), folder)
        known.write_text(str(version))


def publish_store(spec: TeacherSpec, teacher_hash: str) -> None:
    """Replaces the archive of a replica's store by what this node has; nobody may write to the store meanwhile.

    Raises:
        StorageError: the URI cannot be written.
    """
    if not _is_archived(spec):
        return
    folder = store_folder(spec, teacher_hash, spec.replica)
    with alone(folder.with_name(f"{folder.name}.fetching")):
        with writing(join(_archives(spec), f"{folder.name}.tar")) as path, tarfile.open(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.add(file, arcname=file.name)
        version = Folder.at(_archives(spec)).version(f"{folder.name}.tar")
        folder.with_name(f"{folder.name}.version").write_text(str(version))


def _is_archived(spec: TeacherSpec) -> bool:
    return spec.persist and is_uri(spec.store_dir)


def _archives(spec: TeacherSpec) -> str:
    return join(spec.store_dir, ARCHIVES)


def _unpack(archives: Folder, folder: Path) -> None:
    """Puts the archive's content where the store was; who has mapped files of the old one keeps them."""
    fresh = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    packed = folder.with_name(f"{folder.name}.tar")
    try:
        archives.get(packed.name, packed)
        with tarfile.open(packed) as archive:
            archive.extractall(fresh, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
    finally:
        packed.unlink(missing_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
