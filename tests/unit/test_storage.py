"""Answers whether places at URIs behave as folders do: whole files, one copy per node, copies that stay equal.

`file://` takes the way of `s3://` through the code, the file system itself apart; `memory://` comes through fsspec.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from krd_ray.errors import ConfigError, DataError, RunError, StorageError
from krd_ray.storage import node_copies
from krd_ray.storage.node_copies import exists, node_file, node_folder, scratch_folder, writing
from krd_ray.storage.places import Folder, absolute, join, require_folder, split
from krd_ray.storage.working_copy import WorkingCopy, working_copy

NUMBER = itertools.count()


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KRD_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    if request.param == "file":
        return f"file://{tmp_path}/there/run"
    return f"memory://test-{next(NUMBER)}/run"


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read(place: str, name: str) -> str:
    with Folder.at(place).open(name) as file:
        content: str = file.read().decode()
    return content


@pytest.mark.parametrize("wrong", ["s3:/bucket/run", "/work/s3:/bucket", "runs/gs:/bucket"])
def test_uri_that_was_taken_for_a_path_is_not_made_a_folder(wrong: str) -> None:
    with pytest.raises(ConfigError, match="two slashes"):
        absolute(wrong)


def test_password_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="has a password in it") as caught:
        absolute("s3://key:secret@bucket/run")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "where", ["s3://bucket/search", Path("s3://bucket/search"), Path("gs://b/c").absolute()]
)
def test_what_needs_a_folder_says_where_uris_work(where: str | Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"run_dir is (s3://bucket/search|gs://b/c), .*URIs are for data.dir",
    ):
        require_folder(where, "run_dir")


def test_folders_stay_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("runs/a") == str(require_folder("runs/a", "run_dir")) == str(tmp_path / "runs/a")
    assert join(str(tmp_path), "a", "b") == str(tmp_path / "a/b")
    assert split(str(tmp_path / "a")) == (str(tmp_path), "a")
    assert node_folder(str(tmp_path)) == tmp_path
    assert node_file("runs/teacher.pt") == Path("runs/teacher.pt")


def test_unknown_kind_of_place_is_named_with_what_works() -> None:
    with pytest.raises(StorageError, match=r"cannot open nosuch://bucket: .*s3://, gs://"):
        Folder.at("nosuch://bucket")


def test_files_come_back_as_they_went(place: str, tmp_path: Path) -> None:
    folder = Folder.at(place)
    assert folder.files() == {}
    assert folder.version("a/b.txt") is None
    folder.put(text(tmp_path / "x", "one"), "a/b.txt")
    folder.put(text(tmp_path / "x", "two!"), "a/b.txt")
    assert {name: size for name, (size, _) in folder.files().items()} == {"a/b.txt": 4}
    folder.get("a/b.txt", tmp_path / "back/c.txt")
    assert (tmp_path / "back/c.txt").read_text() == "two!"
    assert exists(join(place, "a", "b.txt"))
    folder.remove("a/b.txt")
    folder.remove("a/b.txt")
    assert folder.files() == {}


def test_failed_writing_leaves_the_old_file_and_nothing_else(place: str, tmp_path: Path) -> None:
    folder = Folder.at(place)
    folder.put(text(tmp_path / "x", "old"), "a.txt")
    with pytest.raises(StorageError, match=r"cannot write .*/run/a.txt"):
        folder.put(tmp_path / "missing", "a.txt")
    with pytest.raises(ZeroDivisionError), writing(join(place, "a.txt")) as path:
        path.write_text(str(1 // 0))
    assert read(place, "a.txt") == "old"
    assert folder.files().keys() == {"a.txt"}
    with writing(join(place, "a.txt")) as path:
        path.write_text("new")
    assert read(place, "a.txt") == "new"


def test_full_disk_is_told_as_one(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fs, "copy_files", fill)
    with pytest.raises(StorageError, match=r"No space left on device; free space there; .*KRD_SCRATCH"):
        Folder.at(place).put(text(tmp_path / "x", ""), "a.txt")


def test_failed_reading_leaves_no_file_here(place: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/run/a.txt"):
        Folder.at(place).get("a.txt", tmp_path / "here/a.txt")
    assert list((tmp_path / "here").iterdir()) == []


def test_node_copies_a_file_once_for_all_its_processes(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder.at(place).put(text(tmp_path / "x", "shard"), "a.parquet")
    got: list[str] = []
    get = Folder.get

    def slowly(self: Folder, name: str, to: Path) -> None:
        got.append(name)
        time.sleep(0.1)
        get(self, name, to)

    monkeypatch.setattr(Folder, "get", slowly)
    checksum = hashlib.sha256(b"shard").hexdigest()
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(node_file(join(place, "a.parquet"), sha256=checksum)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert found[0].read_text() == "shard"
    assert got == ["a.parquet"]


def test_damaged_file_is_refused_and_not_kept(place: str, tmp_path: Path, scratch: Path) -> None:
    Folder.at(place).put(text(tmp_path / "x", "damaged"), "a.parquet")
    with pytest.raises(DataError, match=r"run/a.parquet has another checksum than dataset.json says"):
        node_file(join(place, "a.parquet"), sha256="0" * 64)
    assert [path.name for path in scratch.rglob("a.parquet*")] == ["a.parquet.lock"]


def test_file_that_changed_at_its_place_is_copied_again(place: str, tmp_path: Path) -> None:
    folder = Folder.at(place)
    folder.put(text(tmp_path / "x", "first"), "t.pt")
    assert node_file(join(place, "t.pt")).read_text() == "first"
    folder.put(text(tmp_path / "x", "second"), "t.pt")
    assert node_file(join(place, "t.pt")).read_text() == "second"
    with pytest.raises(StorageError, match=r"run/u.pt does not exist"):
        node_file(join(place, "u.pt"))


def test_scratch_that_cannot_be_made_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRD_SCRATCH", str(text(tmp_path / "file", "") / "scratch"))
    with pytest.raises(StorageError, match="set KRD_SCRATCH to a folder"):
        scratch_folder()


def test_scratch_is_for_one_user(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    assert scratch_folder().stat().st_mode & 0o077 == 0
    monkeypatch.setattr(node_copies.os, "getuid", lambda: scratch.stat().st_uid + 1)
    with pytest.raises(StorageError, match="belongs to another user"):
        scratch_folder()


def test_copies_see_what_each_other_writes_and_removes(place: str) -> None:
    driver, worker = WorkingCopy(place), WorkingCopy(place)
    text(driver.path / "config.yaml", "seed: 0")
    text(worker.path / "students/a/metrics.jsonl", "1\n")
    driver.push()
    worker.push()
    driver.pull()
    worker.pull()
    assert (driver.path / "students/a/metrics.jsonl").read_text() == "1\n"
    assert (worker.path / "config.yaml").read_text() == "seed: 0"
    (
        driver.path / "students/a/metrics.jsonl"
    ).unlink()  # as a driver does with the error of an earlier attempt
    driver.sync()
    worker.pull()
    assert Folder.at(place).files().keys() == {"config.yaml"}


def test_file_one_writes_is_never_brought_back_over_it(place: str) -> None:
    """Whatever times the file system shows: an open file would go on being written beside its name."""
    worker = WorkingCopy(place)
    with (worker.path / "metrics.jsonl").open("a") as log:
        for line in range(5):
            log.write(f"{line}\n")
            log.flush()
            worker.push()
            worker.pull()
    assert (worker.path / "metrics.jsonl").read_text() == "0\n1\n2\n3\n4\n"
    assert read(place, "metrics.jsonl") == "0\n1\n2\n3\n4\n"


def test_file_goes_on_where_somebody_else_ended(place: str) -> None:
    first = WorkingCopy(place)
    text(first.path / "metrics.jsonl", "1\n")
    first.push()
    second = WorkingCopy(place)
    second.pull()
    with (second.path / "metrics.jsonl").open("a") as log:
        log.write("2\n")
    second.sync()
    assert read(place, "metrics.jsonl") == "1\n2\n"


def test_what_others_read_where_it_lies_is_left_there(place: str, tmp_path: Path) -> None:
    Folder.at(place).put(text(tmp_path / "x", "state"), "students/a/checkpoints/c/state.pt")
    with working_copy(place) as copy:
        text(copy.path / "half.json.123.partial", "{")
        text(copy.path / "teacher/store/page-0.f16", "0")
        text(copy.path / "students/store/metrics.jsonl", "")  # a student may be called as it likes
        text(copy.path / "students/checkpoints/metrics.jsonl", "")
        text(copy.path / "config.yaml", "seed: 0")
        assert not (copy.path / "students/a").exists()
    assert Folder.at(place).files().keys() == {
        "students/a/checkpoints/c/state.pt",
        "students/store/metrics.jsonl",
        "students/checkpoints/metrics.jsonl",
        "config.yaml",
    }


def test_files_go_in_the_order_of_writing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is one when its config.yaml is there, a dataset when its manifest is: both are written last."""
    put: list[str] = []
    monkeypatch.setattr(Folder, "put", lambda self, source, name: put.append(name))  # noqa: ARG005
    copy = WorkingCopy(place)
    for name in ("z.parquet", "m.parquet", "a.json"):
        text(copy.path / name, "")
        time.sleep(0.02)
    copy.push()
    assert put == ["z.parquet", "m.parquet", "a.json"]


def test_copy_is_kept_equal_while_the_block_runs(place: str) -> None:
    with working_copy(place, every_s=0.02) as copy:
        text(copy.path / "metrics.jsonl", "1\n")
        deadline = time.monotonic() + 20
        while "metrics.jsonl" not in Folder.at(place).files():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not copy.path.exists()


def test_place_that_is_gone_at_the_end_leaves_the_work_here(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fs, "copy_files", refuse)
    with pytest.raises(StorageError, match=r"no route to host.*What could not be written lies in") as caught:
        write_result(place)
    result = Path(caught.value.message.rpartition(" ")[2]) / "result.json"
    assert result.read_text() == "{}"


def write_result(place: str) -> None:
    with working_copy(place, every_s=60) as copy:
        text(copy.path / "result.json", "{}")


def test_error_names_the_place_and_not_the_copy(place: str) -> None:
    with pytest.raises(RunError, match=f"^{place}/students is empty$"), working_copy(place) as copy:
        raise RunError(f"{copy.path / 'students'} is empty")


def test_folder_is_its_own_copy(tmp_path: Path) -> None:
    with working_copy(tmp_path / "run") as copy:
        text(copy.path / "config.yaml", "seed: 0")
    assert (copy.path, copy.place_of(copy.path / "a")) == (tmp_path / "run", str(tmp_path / "run/a"))
    assert (tmp_path / "run/config.yaml").is_file()
