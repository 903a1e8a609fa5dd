"""How row groups are handed to Ray's tasks, and that looking at a block copies nothing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from krd_ray.data.plan import Piece
from krd_ray.data.reading import TASK_BYTES, block_arrays, tasks_of

ROW_BYTES = 3084


@given(st.lists(st.integers(1, 20_000), max_size=60))
def test_tasks_hold_every_piece_in_order_and_grow_up_to_their_limit(rows: list[int]) -> None:
    pieces = [Piece(chunk, 0, n) for chunk, n in enumerate(rows)]
    tasks = list(tasks_of(pieces, ROW_BYTES))
    assert [piece for task in tasks for piece in task] == pieces
    sizes = [sum(piece.num_rows for piece in task) * ROW_BYTES for task in tasks]
    assert all(size <= TASK_BYTES or len(task) == 1 for size, task in zip(sizes, tasks, strict=True))
    assert all(len(task) == 1 for task in tasks[:1])


def test_equal_pieces_double_and_then_stay() -> None:
    pieces = [Piece(chunk, 0, 512) for chunk in range(80)]
    assert list(map(len, tasks_of(pieces, ROW_BYTES))) == [1, 2, 4, 8, 16, 21, 21, 7]


def test_arrays_of_a_block_or_a_part_of_it_are_its_own_memory() -> None:
    pixels = np.arange(40 * 12, dtype=np.uint8).reshape(40, 2, 2, 3)
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(12), 40, [None, pa.py_buffer(pixels)])
    table = pa.table({"sample_id": np.arange(40), "label": np.zeros(40, np.int16), "image": column})
    for start, rows in ((0, 40), (7, 9)):
        part = block_arrays(table.slice(start, rows), 2)
        assert np.shares_memory(part.images_BHWC, pixels)
        assert (part.images_BHWC == pixels[start : start + rows]).all()
        assert part.sample_ids.tolist() == list(range(start, start + rows))
