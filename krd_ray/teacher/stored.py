"""Answers what a persistent target store holds, in a process that did not write it: memory-mapped, without a teacher.

Does not compute and does not write; many processes may read while one writes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from krd_ray.errors import TeacherError
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.pairs import Pairs, read_pairs
from krd_ray.teacher.spec import TeacherSpec, store_folder, store_key
from krd_ray.teacher.store import NEVER, IntArray, RowArray, copy_rows, positions_of
from krd_ray.teacher.store_archive import fetch_store

OPEN_PAGES = 1024


class StoreReader:
    """Reads the rows of one replica's store.

    Args:
        spec: of the teacher that wrote it.
        teacher_hash: its name.
        replica: which one.
        sample_ids: int64 [N], of the whole training split.
        width: values per row.
    Raises:
        TeacherError: there is no such store.
    """

    def __init__(
        self, spec: TeacherSpec, teacher_hash: str, replica: int, sample_ids: IntArray, width: int
    ) -> None:
        fetch_store(spec, teacher_hash, replica)
        self._folder, self._width = store_folder(spec, teacher_hash, replica), width
        path = self._folder / "store.json"
        layout = json.loads(path.read_text()) if path.is_file() else {}
        if layout.get("key") != store_key(spec, teacher_hash):
            raise TeacherError(
                f"{spec.store_dir} holds no targets of this teacher for these images and views; fill it with "
                "`krd targets CONFIG`, on hardware of the same kind and with the same teacher settings"
            )
        self._page_rows = int(layout["page_rows"])
        self._ids = np.unique(sample_ids[home_of(sample_ids, spec.num_replicas) == replica])
        self._table = functools.lru_cache(maxsize=None)(self._map_table)
        self._page = functools.lru_cache(maxsize=OPEN_PAGES)(self._map_page)

    def __call__(self, view_index: IntArray, sample_ids: IntArray) -> RowArray:
        """Returns the raw outputs of (view, sample) pairs, float16 [B, width].

        Raises:
            TeacherError: a pair that the store does not hold.
            DataError: an id that is not one of this store's samples.
        """
        asked = Pairs(view_index, positions_of(self._ids, sample_ids))
        rows = read_pairs(asked, self._rows, np.int64)
        if (rows == NEVER).any():
            first = int(np.flatnonzero(rows == NEVER)[0])
            raise self._absent(f"view {view_index[first]} of sample {sample_ids[first]}")
        pages, offsets = np.divmod(rows, self._page_rows)
        located = []
        for page in np.unique(pages).tolist():
            places = np.flatnonzero(pages == page)
            located.append((self._page(page), offsets[places], places))
        return copy_rows(located, len(asked), self._width)

    def require(self, views: Iterable[int]) -> None:
        """Makes sure that the store holds whole views, before anybody trains from them.

        Raises:
            TeacherError: a pair that the store does not hold.
        """
        everything = np.arange(len(self._ids))
        for view in views if len(everything) else ():
            rows = self._rows(view, everything)
            absent = np.flatnonzero(rows == NEVER)
            if len(absent):
                raise self._absent(f"view {view} of {len(absent)} samples, first {self._ids[absent[0]]}")
            for page in np.unique(rows // self._page_rows).tolist():
                self._page_path(page)

    def _rows(self, view: int, position: IntArray) -> IntArray:
        return np.asarray(self._table(view)[position])

    def _map_table(self, view: int) -> IntArray:
        path = self._folder / f"view-{view}.rows"
        if not path.is_file():
            raise self._absent(f"view {view}")
        return np.memmap(path, dtype=np.int64, mode="r", shape=(len(self._ids),))

    def _map_page(self, page: int) -> RowArray:
        shape = (self._page_rows, self._width)
        return np.memmap(self._page_path(page), dtype=np.float16, mode="r", shape=shape)

    def _page_path(self, page: int) -> Path:
        path = self._folder / f"page-{page}.f16"
        if not path.is_file():
            raise TeacherError(
                f"{path} is gone: the store's budget was too small for all views; raise teacher.disk_bytes and "
                "run `krd targets CONFIG` again"
            )
        return path

    def _absent(self, what: str) -> TeacherError:
        return TeacherError(
            f"the target store in {self._folder} lacks {what}; run `krd targets CONFIG` with the same views.cycle, "
            "or set teacher.placement: actors"
        )
