"""Answers whether the target store gives back what was put in, within its budgets and across restarts."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krd_ray.errors import DataError, TeacherError
from krd_ray.teacher.store import PAGE_BYTES, RowArray, TargetStore, copy_rows, fits_store, lock_folder

WIDTH = 8
ROW_BYTES = WIDTH * 2
IDS = np.arange(100, dtype=np.int64) * 7 + 3


def open_store(
    folder: Path,
    *,
    key: str = "k",
    memory_rows: int = 1000,
    disk_rows: int = 0,
    persist: bool = False,
    ids: np.ndarray = IDS,
) -> TargetStore:
    return TargetStore(
        folder,
        key,
        ids,
        WIDTH,
        memory_bytes=memory_rows * ROW_BYTES,
        disk_bytes=disk_rows * ROW_BYTES,
        persist=persist,
    )


def values_of(view: int, position: np.ndarray) -> RowArray:
    """A value that names its view and sample."""
    return (view * 100 + position[:, None] + np.arange(WIDTH) / 16).astype(np.float16)


def put(store: TargetStore, view: int, position: np.ndarray) -> None:
    store.put(view, position, values_of(view, position))


def read(store: TargetStore, view: int, position: np.ndarray) -> RowArray:
    return copy_rows(store.locate(store.rows(view, position)), len(position), WIDTH)


def check(store: TargetStore, view: int, position: np.ndarray) -> None:
    np.testing.assert_array_equal(read(store, view, position), values_of(view, position))


@given(
    order=st.permutations(range(30)), cuts=st.lists(st.integers(1, 29), max_size=4), view=st.integers(0, 3)
)
@settings(max_examples=25, deadline=None)
def test_rows_come_back_in_the_order_asked_for(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: list[int], view: int
) -> None:
    store = open_store(tmp_path_factory.mktemp("store"), memory_rows=60)
    position = np.array(order)
    for part in np.split(position, sorted(cuts)):
        put(store, view, part)
    check(store, view, np.arange(30)[::-1])
    assert (store.rows(view, np.arange(30, 100)) < 0).all()
    assert (store.rows(view + 1, position) < 0).all()


def test_ids_are_found_by_value_whatever_their_order(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", ids=np.array([50, -3, 2**62, 9]))
    assert store.num_samples == 4
    assert store.index(np.array([2**62, -3, 50])).tolist() == [3, 0, 2]


def test_unknown_id_is_refused_by_value(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    for unknown in (-1, 4, 10**9):
        with pytest.raises(DataError, match=f"sample {unknown} is not in the shards"):
            store.index(np.array([3, unknown]))


def test_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 sample ids stand twice"):
        open_store(tmp_path / "s", ids=np.array([1, 2, 1, 2]))


def test_budget_in_memory_is_kept_and_spilled_rows_keep_their_values(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", memory_rows=16, disk_rows=1000)
    for start in range(0, 100, 5):
        put(store, 0, np.arange(start, start + 5))
        assert store.memory_bytes <= 16 * ROW_BYTES
    check(store, 0, np.arange(100))
    assert store.disk_bytes >= 84 * ROW_BYTES
    assert len(list((tmp_path / "s").glob("page-*.f16"))) * 4 * ROW_BYTES == store.disk_bytes


def test_oldest_rows_are_dropped_first_and_known_to_have_been_computed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", memory_rows=16, disk_rows=20)
    for view in range(2):
        for start in range(0, 100, 10):
            put(store, view, np.arange(start, start + 10))
            assert store.disk_bytes <= 20 * ROW_BYTES
    everything = np.arange(100)
    assert (store.rows(0, everything) < 0).all()
    assert store.was_computed(0, everything).all()
    live = store.rows(1, everything) >= 0
    assert live.tolist() == sorted(live.tolist()), "the newest are kept"
    assert 20 <= live.sum() <= 36
    check(store, 1, everything[live])
    assert not store.was_computed(2, everything).any()


def test_dropped_row_can_be_put_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", memory_rows=8)
    put(store, 0, np.arange(20))
    assert store.rows(0, np.array([0]))[0] < 0
    put(store, 0, np.array([0]))
    check(store, 0, np.array([0, 19]))


def test_dropped_page_leaves_no_mapping_that_holds_its_disk_space(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s", memory_rows=8, disk_rows=8)
    for start in range(0, 100, 4):
        put(store, 0, np.arange(start, start + 4))
        live = np.flatnonzero(store.rows(0, np.arange(100)) >= 0)
        check(store, 0, live)
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}/s/page" in line]
    assert not [line for line in held if "(deleted)" in line]


def test_capacity_counts_both_budgets(tmp_path: Path) -> None:
    assert open_store(tmp_path / "a", memory_rows=16, disk_rows=32).capacity_rows == 48
    assert open_store(tmp_path / "b", memory_rows=16, disk_rows=32, persist=True).capacity_rows == 32


@given(rows=st.integers(1, 100), disk_rows=st.integers(1, 150), page_rows=st.sampled_from([3, 7, 50]))
@settings(max_examples=60, deadline=None)
def test_rows_are_said_to_fit_exactly_when_none_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, rows: int, disk_rows: int, page_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("krd_ray.teacher.store.PAGE_BYTES", page_rows * ROW_BYTES)
        store = open_store(tmp_path_factory.mktemp("store"), disk_rows=disk_rows, persist=True)
        for part in np.array_split(np.arange(rows), 3):
            put(store, 0, part)
        held = (store.rows(0, np.arange(rows)) >= 0).all()
        assert fits_store(rows, WIDTH, disk_rows * ROW_BYTES) == held
        enough = rows * ROW_BYTES + page_rows * ROW_BYTES
        assert fits_store(rows, WIDTH, enough)


def test_located_pages_stay_valid_when_they_are_dropped_later(tmp_path: Path) -> None:
    for disk_rows in (0, 16):
        store = open_store(tmp_path / f"s{disk_rows}", memory_rows=8, disk_rows=disk_rows)
        put(store, 0, np.arange(8))
        if disk_rows:
            put(store, 0, np.arange(8, 16))  # the first ones lie on disk now
        parts = store.locate(store.rows(0, np.arange(8)))
        put(store, 1, np.arange(100))
        assert (store.rows(0, np.arange(8)) < 0).all()
        np.testing.assert_array_equal(copy_rows(parts, 8, WIDTH), values_of(0, np.arange(8)))


def test_store_that_persists_finds_all_rows_after_a_crash_and_goes_on(tmp_path: Path) -> None:
    first = open_store(tmp_path / "s", disk_rows=1000, persist=True)
    put(first, 0, np.arange(37))
    put(first, 5, np.arange(3))
    again = open_store(tmp_path / "s", disk_rows=1000, persist=True)  # the first was never closed
    check(again, 0, np.arange(37))
    check(again, 5, np.arange(3))
    assert (again.rows(0, np.arange(37, 100)) < 0).all()
    assert again.disk_bytes == first.disk_bytes
    put(again, 0, np.arange(37, 100))
    check(again, 0, np.arange(100))
    check(again, 5, np.arange(3))
    assert again.memory_bytes == 0


def test_crash_after_rows_were_dropped_brings_back_the_unbroken_end(tmp_path: Path) -> None:
    first = open_store(tmp_path / "s", disk_rows=16, persist=True)
    put(first, 0, np.arange(50))
    live = np.flatnonzero(first.rows(0, np.arange(100)) >= 0)
    again = open_store(tmp_path / "s", disk_rows=16, persist=True)
    np.testing.assert_array_equal(np.flatnonzero(again.rows(0, np.arange(100)) >= 0), live)
    check(again, 0, live)
    assert again.was_computed(0, np.arange(50)).all()


def test_store_that_does_not_persist_forgets_rows_but_not_that_they_were_computed(tmp_path: Path) -> None:
    first = open_store(tmp_path / "s", memory_rows=16, disk_rows=1000)
    put(first, 0, np.arange(60))
    again = open_store(tmp_path / "s", memory_rows=16, disk_rows=1000)
    everything = np.arange(100)
    assert (again.rows(0, everything) < 0).all()
    assert again.was_computed(0, everything).tolist() == [True] * 60 + [False] * 40
    assert not list((tmp_path / "s").glob("page-*.f16"))
    put(again, 0, everything)
    check(again, 0, everything)


@pytest.mark.parametrize("persist", [False, True])
def test_other_key_empties_the_folder(tmp_path: Path, persist: bool) -> None:
    put(open_store(tmp_path / "s", disk_rows=1000, persist=persist), 0, np.arange(50))
    other = open_store(tmp_path / "s", key="other weights", disk_rows=1000, persist=persist)
    assert (other.rows(0, np.arange(100)) < 0).all()
    assert not other.was_computed(0, np.arange(100)).any()
    assert not list((tmp_path / "s").glob("page-*.f16"))


def test_closing_deletes_the_pages_unless_they_persist_but_not_the_memory_of_what_was_computed(
    tmp_path: Path,
) -> None:
    for persist in (False, True):
        store = open_store(tmp_path / str(persist), disk_rows=100, persist=persist)
        put(store, 0, np.arange(10))
        store.close()
        assert bool(list((tmp_path / str(persist)).glob("page-*"))) == persist
    again = open_store(tmp_path / "False", disk_rows=100, persist=False)
    assert (again.rows(0, np.arange(10)) < 0).all()
    assert again.was_computed(0, np.arange(10)).all()
    check(open_store(tmp_path / "True", disk_rows=100, persist=True), 0, np.arange(10))


@contextmanager
def disk_that_takes_files_of(num_bytes: int) -> Iterator[None]:
    """Lets the operating system refuse longer files, as it does where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(store: TargetStore) -> None:
    for view in range(2, 20):
        put(store, view, np.arange(100))


@pytest.mark.parametrize("persist", [False, True])
def test_full_disk_is_told_and_what_was_stored_stays_readable(tmp_path: Path, persist: bool) -> None:
    store = open_store(tmp_path / "s", memory_rows=1600, disk_rows=1600, persist=persist)
    put(store, 0, np.arange(100))
    put(store, 1, np.arange(100))
    half_a_page = 400 * ROW_BYTES // 2
    with (
        disk_that_takes_files_of(half_a_page),
        pytest.raises(TeacherError, match=r"cannot write .*page-\d+.* free space there"),
    ):
        fill(store)
    found = 0
    for view in range(20):
        live = np.flatnonzero(store.rows(view, np.arange(100)) >= 0)
        check(store, view, live)
        found += len(live)
    assert found >= 200
    put(store, 19, np.arange(100))
    check(store, 19, np.arange(100))


def test_disk_too_full_for_a_new_view_is_told_too(tmp_path: Path) -> None:
    store = open_store(tmp_path / "s")
    put(store, 0, np.arange(10))
    with (
        disk_that_takes_files_of(400),
        pytest.raises(TeacherError, match=r"cannot write .*view-1\.rows"),
    ):
        store.rows(1, np.arange(10))
    assert (store.rows(1, np.arange(10)) < 0).all()
    check(store, 0, np.arange(10))


def test_folder_belongs_to_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krd_ray.teacher.store.LOCK_WAIT_S", 0.0)
    first = lock_folder(tmp_path / "deep" / "s")
    with pytest.raises(TeacherError, match=r"another running teacher keeps its target store in .*spill_dir"):
        lock_folder(tmp_path / "deep" / "s")
    lock_folder(tmp_path / "deep" / "other").close()
    first.close()
    lock_folder(tmp_path / "deep" / "s").close()


def test_batch_is_found_and_gathered_quickly(tmp_path: Path) -> None:
    num_rows, width = 20_000, 600
    rng = np.random.default_rng(0)
    store = TargetStore(
        tmp_path / "s", "k", np.arange(num_rows), width, memory_bytes=num_rows * width * 4, disk_bytes=0
    )
    block = rng.standard_normal((num_rows, width)).astype(np.float16)
    store.put(0, np.arange(num_rows), block)
    assert store.memory_bytes > PAGE_BYTES, "more than one page"
    ids = rng.choice(num_rows, 256, replace=False)
    took_s = []
    for _ in range(5):
        started = time.perf_counter()
        position = store.index(ids)
        found = copy_rows(store.locate(store.rows(0, position)), 256, width)
        took_s.append(time.perf_counter() - started)
    np.testing.assert_array_equal(found, block[ids])
    assert min(took_s) < 0.02
