"""Answers where the teacher's raw outputs are kept: one row per (view, sample), memory first, then disk.

Does not compute outputs and is not thread-safe: the engine holds the lock.

Rows are appended to pages in the order they are computed, which is about the order in which other students ask
for them. Pages leave memory, and then the disk, oldest first; a row older than the oldest page is absent. A
table per view maps samples to rows; it lives in a memory-mapped file, so that a restarted process still knows
what was computed before and, with `persist`, finds it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from krd_ray.atomic import write_bytes
from krd_ray.errors import DataError, DiskFullError, TeacherError
from krd_ray.teacher.lock import hold_lock

IntArray = npt.NDArray[np.int64]
RowArray = npt.NDArray[np.float16]
NEVER = -1
PAGE_BYTES = 4 << 20
OPEN_DISK_PAGES = 256
LOCK_WAIT_S = 10.0  # a killed process lets go of its lock at once, but may take a moment to die


class TargetStore:
    """Append-only pages of float16 rows under a byte budget.

    Args:
        folder: for tables, spilled pages and, with `persist`, all pages; one store, one folder.
        key: hash of weights, preprocessing, view spec and images; a folder of another key is emptied.
        sample_ids: int64 [N], the samples this store is the home of.
        width: values per row.
        memory_bytes: budget of pages in memory.
        disk_bytes: budget of pages on disk.
        persist: write every page straight to a file, so that nothing is computed again after a restart.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        sample_ids: IntArray,
        width: int,
        *,
        memory_bytes: int,
        disk_bytes: int,
        persist: bool = False,
    ) -> None:
        self._folder, self._width, self._persist = folder, width, persist
        self._memory_budget, self._disk_budget = memory_bytes, disk_bytes
        self._ids = np.unique(sample_ids)
        if len(self._ids) != len(sample_ids):
            raise DataError(f"{len(sample_ids) - len(self._ids)} sample ids stand twice in the shards")
        self._page_rows = page_rows_of(disk_bytes if persist else memory_bytes, width)
        self._tables: dict[int, IntArray] = {}
        self._memory: dict[int, RowArray] = {}
        self._disk: set[int] = set()
        self._writable: dict[int, RowArray] = {}
        self._first_page = 0
        self._next_row = 0
        self._open_page = functools.lru_cache(maxsize=OPEN_DISK_PAGES)(self._map_page)
        self._reopen(key)

    @property
    def memory_bytes(self) -> int:
        """Bytes of pages held in memory now."""
        return len(self._memory) * self._page_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of pages on disk now."""
        return len(self._disk) * self._page_bytes

    @property
    def num_samples(self) -> int:
        """Samples that this store is the home of."""
        return len(self._ids)

    @property
    def capacity_rows(self) -> int:
        """Rows that both budgets hold together."""
        budget = self._disk_budget + (0 if self._persist else self._memory_budget)
        return budget // self._page_bytes * self._page_rows

    def index(self, sample_ids: IntArray) -> IntArray:
        """Returns the position of each id in the store's sample list, int64 [B].

        Raises:
            DataError: an id that is not one of this store's samples.
        """
        return positions_of(self._ids, sample_ids)

    def rows(self, view: int, position: IntArray) -> IntArray:
        """Returns the row of each sample in a view, int64 [B]; below 0 where there is none.

        Raises:
            TeacherError: the disk is full.
        """
        rows = np.asarray(self._table(view)[position])
        return np.where(rows < self._first_page * self._page_rows, NEVER, rows)

    def was_computed(self, view: int, position: IntArray) -> npt.NDArray[np.bool_]:
        """Returns which samples were computed once, even if their row has since been dropped, bool [B]."""
        return np.not_equal(self._table(view)[position], NEVER)

    def put(self, view: int, position: IntArray, values: RowArray) -> None:
        """Appends rows, [B, width], and makes room by the budget.

        Raises:
            TeacherError: the disk is full.
        """
        done = 0
        while done < len(values):
            page, offset = divmod(self._next_row, self._page_rows)
            if offset == 0:
                self._start_page(page)
            count = min(self._page_rows - offset, len(values) - done)
            target = self._writable[page] if self._persist else self._memory[page]
            target[offset : offset + count] = values[done : done + count]
            rows = np.arange(self._next_row, self._next_row + count)
            self._table(view)[position[done : done + count]] = rows
            self._next_row += count
            done += count

    def locate(self, rows: IntArray) -> list[tuple[RowArray, IntArray, IntArray]]:
        """Returns (page, offsets in it, places in the batch) for live rows; stays valid when pages move later."""
        pages, offsets = np.divmod(rows, self._page_rows)
        found = []
        for page in np.unique(pages).tolist():
            places = np.flatnonzero(pages == page)
            found.append((self._page(page), offsets[places], places))
        return found

    def close(self) -> None:
        """Forgets all rows unless the store persists; the tables stay, to tell a resumed run what was computed."""
        self._memory.clear()
        self._writable.clear()
        self._open_page.cache_clear()
        if not self._persist:
            for page in self._disk:
                self._page_path(page).unlink(missing_ok=True)

    @property
    def _page_bytes(self) -> int:
        return self._page_rows * self._width * 2

    def _page(self, page: int) -> RowArray:
        if page in self._writable:
            return self._writable[page]
        return self._memory[page] if page in self._memory else self._open_page(page)

    def _table(self, view: int) -> IntArray:
        if view not in self._tables:
            path = self._folder / f"view-{view}.rows"
            if not path.exists():
                try:
                    write_bytes(path, np.full(len(self._ids), NEVER, np.int64).tobytes())
                except (OSError, DiskFullError) as error:
                    raise _cannot_write(path, error) from error
            self._tables[view] = np.memmap(path, dtype=np.int64, mode="r+", shape=(len(self._ids),))
        return self._tables[view]

    def _start_page(self, page: int) -> None:
        if self._persist:
            self._writable = {page: self._create_page(page)}
            self._disk.add(page)
        else:
            while self._memory and self.memory_bytes + self._page_bytes > self._memory_budget:
                self._spill(min(self._memory))
            self._memory[page] = np.empty((self._page_rows, self._width), np.float16)
        while self._disk and self.disk_bytes > self._disk_budget:
            self._drop(min(self._disk))

    def _spill(self, page: int) -> None:
        """Moves the oldest page from memory to disk, or drops it where the disk budget is nothing."""
        if self._page_bytes > self._disk_budget:
            self._first_page = page + 1
        else:
            self._create_page(page)[:] = self._memory[page]
            self._disk.add(page)
        del self._memory[page]  # last: after a full disk the page is still here

    def _drop(self, page: int) -> None:
        self._disk.remove(page)
        self._page_path(page).unlink(missing_ok=True)
        self._open_page.cache_clear()  # a page that is still mapped would keep its place on the disk
        self._first_page = page + 1

    def _page_path(self, page: int) -> Path:
        return self._folder / f"page-{page}.f16"

    def _create_page(self, page: int) -> RowArray:
        path = self._page_path(page)
        try:
            with path.open(
                "wb"
            ) as file:  # written out now, so that a full disk is an error here, not a SIGBUS later
                file.write(bytes(self._page_bytes))
            return np.memmap(path, dtype=np.float16, mode="r+", shape=(self._page_rows, self._width))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _cannot_write(path, error) from error

    def _map_page(self, page: int) -> RowArray:
        return np.memmap(
            self._page_path(page), dtype=np.float16, mode="r", shape=(self._page_rows, self._width)
        )

    def _reopen(self, key: str) -> None:
        """Takes over what an earlier process left in the folder, if it is of the same key and layout."""
        layout = {
            "key": key,
            "samples": hashlib.sha256(self._ids.tobytes()).hexdigest(),
            "width": self._width,
            "page_rows": self._page_rows,
        }
        path = self._folder / "store.json"
        if not path.exists() or json.loads(path.read_text()) != layout:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_bytes(path, json.dumps(layout).encode())
            return
        for table in self._folder.glob("view-*.rows"):
            view = int(table.stem.removeprefix("view-"))
            self._next_row = max(self._next_row, int(self._table(view).max()) + 1)
        self._recover_pages()

    def _recover_pages(self) -> None:
        """Keeps the unbroken run of page files that ends at the newest row; older ones were dropped or lost."""
        pages = {int(path.stem.removeprefix("page-")) for path in self._folder.glob("page-*.f16")}
        last = (self._next_row - 1) // self._page_rows if self._next_row else -1
        if not self._persist or last not in pages:
            self._first_page = last + 1
            self._next_row = self._first_page * self._page_rows
            for page in pages:
                self._page_path(page).unlink()
            return
        first = last
        while first - 1 in pages:
            first -= 1
        self._first_page, self._disk = first, set(range(first, last + 1))
        if self._next_row % self._page_rows:
            path = self._page_path(last)
            self._writable = {
                last: np.memmap(path, dtype=np.float16, mode="r+", shape=(self._page_rows, self._width))
            }


def page_rows_of(budget_bytes: int, width: int) -> int:
    """Returns the rows of a page: 4 MiB, less where the budget would hold fewer than four such pages."""
    return max(1, min(PAGE_BYTES, budget_bytes // 4) // (2 * width))


def fits_store(rows: int, width: int, budget_bytes: int) -> bool:
    """Returns whether a store of that budget holds so many rows at once, in whole pages.

    Example:
        >>> fits_store(100, 8, 1600), fits_store(101, 8, 1600)
        (True, False)
    """
    page_rows = page_rows_of(budget_bytes, width)
    return -(-rows // page_rows) * page_rows * width * 2 <= budget_bytes


def positions_of(ids: IntArray, sample_ids: IntArray) -> IntArray:
    """Returns the place of each sample in a store's sorted ids, int64 [B].

    Raises:
        DataError: an id that is not among them.
    Example:
        >>> positions_of(np.array([2, 5, 9]), np.array([9, 2])).tolist()
        [2, 0]
    """
    position = np.minimum(np.searchsorted(ids, sample_ids), len(ids) - 1)
    unknown = ids[position] != sample_ids
    if unknown.any():
        raise DataError(
            f"sample {int(sample_ids[unknown][0])} is not in the shards the teacher was started with; "
            "student and teacher must read the same dataset"
        )
    return position


def copy_rows(parts: list[tuple[RowArray, IntArray, IntArray]], num_rows: int, width: int) -> RowArray:
    """Returns the located rows as one array, float16 [num_rows, width]."""
    out = np.empty((num_rows, width), np.float16)
    for page, offsets, places in parts:
        out[places] = page[offsets]
    return out


def _cannot_write(path: Path, error: OSError | DiskFullError) -> TeacherError:
    why = error.strerror if isinstance(error, OSError) else os.strerror(errno.ENOSPC)
    return TeacherError(
        f"the target store cannot write {path} ({why}); free space there, "
        "lower teacher.disk_bytes or set teacher.spill_dir to another disk"
    )


def lock_folder(folder: Path) -> IO[bytes]:
    """Makes this process the only user of a store's folder until the returned file is closed or it dies.

    Raises:
        TeacherError: another living process uses the folder.
    """
    busy = TeacherError(
        f"another running teacher keeps its target store in {folder}; set teacher.spill_dir to a "
        "folder of this run's own, or wait for the other run"
    )
    return hold_lock(folder.with_name(folder.name + ".lock"), busy, wait_s=LOCK_WAIT_S)
