"""Whatever is being saved when a process is killed, or the disk is full, the old content or the new one is there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from benchmarks.faults.atomic import kill_savers
from benchmarks.faults.savers import SAVERS
from krd_ray.atomic import write_file, write_text
from krd_ray.errors import DiskFullError
from krd_ray.train.rundir import MetricsLog, StudentDir


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

    with pytest.raises(
        DiskFullError, match=r"cannot write .*config.yaml: No space left on device; free space"
    ):
        write_file(path, half)
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["config.yaml"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_another_error_while_writing_stays_what_it_is(tmp_path: Path) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        write_file(tmp_path / "config.yaml", refuse)


def test_rows_that_find_no_room_say_which_file_they_were_for(tmp_path: Path) -> None:
    full = Path("/dev/full")  # every write to it says that the disk is full
    folder = StudentDir(tmp_path / "small")
    folder.root.mkdir()
    folder.metrics.symlink_to(full)
    with pytest.raises(DiskFullError, match=r"cannot write .*small/metrics\.jsonl: No space left on device"):
        MetricsLog(folder, "small", 0).write("train", 0, 1)
