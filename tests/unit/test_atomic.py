"""Whatever is being saved when a process is killed, or the disk is full, the old content or the new one is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.storage import StorageContext

from benchmarks.faults.atomic import kill_savers
from benchmarks.faults.savers import SAVERS
from krd_ray.atomic import write_file, write_text
from krd_ray.train.whole_files import whole_files


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_kill_9_while_saving_leaves_everything_readable(tmp_path: Path) -> None:
    found = kill_savers(tmp_path / "saved", 2 * len(SAVERS))
    assert found["errors"] == []
    assert {each["kills"] for each in found["by_kind"].values()} == {2}
    assert found["saves"] > 0


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "made" / "config.yaml"
    write_text(path, "old")

    def half(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, half)
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["config.yaml"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_ray_train_keeps_appears_when_it_is_closed(tmp_path: Path) -> None:
    files = cloudpickle.loads(cloudpickle.dumps(whole_files()))  # it travels to workers
    context = StorageContext(tmp_path, "checkpoints", storage_filesystem=files)
    path = Path(context.checkpoint_manager_snapshot_path)
    with files.open_output_stream(str(path)) as file:
        file.write(b"old")
    file = files.open_output_stream(str(path))
    file.write(b"n")
    file.flush()
    assert path.read_bytes() == b"old"
    file.write(b"ew")
    file.close()
    assert path.read_bytes() == b"new"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_list_of_checkpoints_that_a_full_disk_cut_short_does_not_replace_the_old_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(b"old")
    file = whole_files().open_output_stream(str(path))
    full = os.open("/dev/full", os.O_WRONLY)  # every write to it says that the disk is full
    (partial,) = tmp_path.glob(".list.json.*.partial")
    target = next(fd for fd in os.listdir("/proc/self/fd") if _leads_to(fd, partial))
    os.dup2(full, int(target))
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(1 << 20))
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):
        file.close()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["list.json"]


def _leads_to(descriptor: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    except FileNotFoundError:
        return False
