"""Answers what a node says of itself: versions, GPUs, memory, disk, ports, clock, and a folder seen from it.

Does not judge. It travels to the nodes by value and imports nothing of krd_ray, so that a node with another version
of it, or none, still answers; what it returns are plain values.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("krd_ray", "ray", "torch", "torchvision", "optuna", "pyarrow")
SHARED_MEMORY = Path("/dev/shm")
READ_TIMEOUT_S = 5.0  # network file systems show another node's file a little later


class Examiner:
    """One per node; `gather` pins it there as a Ray actor."""

    def facts(self) -> dict[str, Any]:
        """Returns what the node has, by the fields of `NodeFacts`."""
        import psutil  # type: ignore[import-untyped]
        from ray._private.authentication.authentication_utils import is_token_auth_enabled

        session = _session()
        disk = shutil.disk_usage(session)
        seen, built = _gpus()
        return {
            "versions": versions(),
            "torch_gpus": seen,
            "torch_cuda": built,
            "memory_bytes": psutil.virtual_memory().total,
            "shared_memory_bytes": shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
            "disk_path": str(session),
            "disk_total_bytes": disk.total,
            "disk_free_bytes": disk.free,
            "has_token": is_token_auth_enabled(),
            "open_ports": _open_ports(session.name),
        }

    def clock(self) -> float:
        """Returns the seconds that this node's clock shows."""
        return time.time()

    def write(self, folder: str, name: str) -> str:
        """Writes a small file into a new folder whose parent is there; returns what went wrong, or nothing."""
        try:
            files, path = _file_system(folder)
            if not _exists(files, path):
                files.create_dir(path, recursive=False)
            with files.open_output_stream(f"{path}/{name}") as stream:
                stream.write(name.encode())
        except (OSError, ValueError) as error:
            return _reason(error)
        return ""

    def read(self, wanted: dict[str, str | None]) -> dict[str, str]:
        """Reads files, waiting a little for them all together; returns by path what went wrong.

        Args:
            wanted: by path what the file must hold; None: whatever it holds.
        """
        deadline = time.monotonic() + READ_TIMEOUT_S
        while True:
            errors = {path: _unread(path, content) for path, content in wanted.items()}
            errors = {path: error for path, error in errors.items() if error}
            if not errors or time.monotonic() > deadline:
                return errors
            time.sleep(0.2)

    def remove(self, folder: str) -> None:
        """Removes what `write` has made, where this node sees it."""
        files, path = _file_system(folder)
        if _exists(files, path):
            files.delete_dir(path)


def _unread(path: str, content: str | None) -> str:
    try:
        files, inside = _file_system(path)
        with files.open_input_stream(inside) as stream:
            found = stream.read().decode()
    except (OSError, ValueError) as error:
        return _reason(error)
    return "" if content in (None, found) else f"{path} holds something else"


def versions() -> dict[str, str]:
    """Returns the version of Python and of each package that must be the same everywhere; `none` where it is not."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from sources" if importlib.util.find_spec(name) else "none"
    return found


def _gpus() -> tuple[int, str | None]:
    """GPUs that torch sees, and the CUDA it was built for."""
    if importlib.util.find_spec("torch") is None:
        return 0, None
    import torch

    return torch.cuda.device_count(), torch.version.cuda


def _session() -> Path:
    """Ray's folder on this node: sockets, logs and spilled objects."""
    from ray._private.worker import global_worker

    node: Any = global_worker.node
    return Path(node.get_session_dir_path())


def _open_ports(session: str) -> dict[str, list[int]]:
    """Ports of this session's Ray processes that listen beyond loopback, by the program's name."""
    import psutil

    found: dict[str, list[int]] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        program = _program(connection.pid, session)
        if program and not ipaddress.ip_address(connection.laddr.ip).is_loopback:
            found.setdefault(program, []).append(connection.laddr.port)
    return {name: sorted(set(ports)) for name, ports in found.items()}


def _program(pid: int, session: str) -> str | None:
    """`dashboard`, `gcs_server`, ...; None for a process that is not of the session."""
    import psutil

    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:  # it has ended since, or is another user's
        return None
    if not any(session in word for word in words):
        return None
    scripts = [Path(word).stem for word in words[1:3] if word.endswith(".py")]
    return scripts[-1] if scripts else Path(words[0]).name


def _file_system(path: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    found: tuple[Any, str] = FileSystem.from_uri(path)
    return found


def _exists(files: Any, path: str) -> bool:
    from pyarrow.fs import FileType

    return bool(files.get_file_info(path).type != FileType.NotFound)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
