"""Answers which pixels belong to a sample id, from the decoded blocks in the object store.

Does not read shards: a split without cached blocks has no such lookup. Blocks are mapped, not copied; a node holds
each of them once, whoever asks.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import ray

from krd_ray.data.plan import IntArray
from krd_ray.data.reading import block_arrays
from krd_ray.data.shard_set import ShardSet
from krd_ray.errors import DataError

MAPPED_BLOCKS = 4096


class CachedPixels:
    """Looks images up by sample id.

    Args:
        shards: a split with cached blocks.
        sample_ids: int64 [N], of the split in file order.
        timeout_s: how long one block may take to arrive on this node.
    Raises:
        DataError: the split has no cached blocks.
    """

    def __init__(self, shards: ShardSet, sample_ids: IntArray, *, timeout_s: float) -> None:
        if shards.blocks is None:
            raise DataError(f"{shards.root} is not cached in the object store; set data.cache to memory")
        self._shards, self._blocks, self._timeout_s = shards, shards.blocks, timeout_s
        self._order = np.argsort(sample_ids, kind="stable")
        self._sorted_ids = sample_ids[self._order]
        self._first_row = np.concatenate([[0], np.cumsum(shards.chunk_rows)])
        self._images = functools.lru_cache(maxsize=MAPPED_BLOCKS)(self._map_block)

    def __call__(self, sample_ids: IntArray) -> npt.NDArray[np.uint8]:
        """Returns the images of samples, uint8 [B, side, side, 3].

        Raises:
            DataError: an id that is not in the split.
        """
        place = np.minimum(np.searchsorted(self._sorted_ids, sample_ids), len(self._sorted_ids) - 1)
        unknown = self._sorted_ids[place] != sample_ids
        if unknown.any():
            raise DataError(
                f"sample {int(sample_ids[unknown][0])} is not in the shards in {self._shards.root}"
            )
        rows = self._order[place]
        chunks = np.searchsorted(self._first_row, rows, side="right") - 1
        side = self._shards.side
        images = np.empty((len(rows), side, side, 3), np.uint8)
        for chunk in np.unique(chunks).tolist():
            taken = np.flatnonzero(chunks == chunk)
            images[taken] = self._images(chunk)[rows[taken] - self._first_row[chunk]]
        return images

    def _map_block(self, chunk: int) -> npt.NDArray[np.uint8]:
        table = ray.get(self._blocks[chunk], timeout=self._timeout_s)
        return block_arrays(table, self._shards.side).images_BHWC
