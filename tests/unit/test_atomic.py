"""Whatever is being saved when a process is killed, or the disk is full, the old content or the new one is there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from benchmarks.faults.atomic import kill_savers
from benchmarks.faults.savers import SAVERS
from krd_ray.atomic import write_file, write_text


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
