"""Answers which (view, sample) pairs a request names, each once, and how to look them up view by view.

Does not hold answers (`store` does): views are lists of samples there, and a batch may mix views when samples repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from krd_ray.teacher.store import IntArray

Value = TypeVar("Value", np.int64, np.bool_)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of view and sample.

    Args:
        view: int64 [n].
        position: int64 [n], of the sample in the store.
    """

    view: IntArray
    position: IntArray

    def __len__(self) -> int:
        return len(self.position)

    def at(self, places: IntArray) -> Pairs:
        """Returns the pairs at some places."""
        return Pairs(self.view[places], self.position[places])

    @cached_property
    def by_view(self) -> list[tuple[int, IntArray]]:
        """Each view with the places of its pairs; one entry where all pairs are of one view."""
        if len(self) == 0:
            return []
        if (self.view == self.view[0]).all():
            return [(int(self.view[0]), np.arange(len(self)))]
        order = np.argsort(self.view, kind="stable")
        views, starts = np.unique(self.view[order], return_index=True)
        return list(zip(views.tolist(), np.split(order, starts[1:]), strict=True))

    def samples(self) -> Iterator[tuple[int, IntArray, IntArray]]:
        """Yields each view with its places and the positions of its samples."""
        for view, places in self.by_view:
            yield view, places, self.position[places]


def distinct(pairs: Pairs, num_samples: int) -> tuple[IntArray, IntArray] | None:
    """Finds pairs that come more than once.

    Args:
        pairs: of one request.
        num_samples: number of samples of the store, above every position.
    Returns:
        Places [m] of each pair's first coming and, for every pair, its number among those [n]; None when all differ.
    Example:
        >>> distinct(Pairs(np.array([0, 1, 0]), np.array([5, 5, 5])), 9)
        (array([0, 1]), array([0, 1, 0]))
    """
    names = pairs.view * num_samples + pairs.position
    if len(np.unique(names)) == len(names):
        return None
    _, first, number = np.unique(names, return_index=True, return_inverse=True)
    return first, number


def read_pairs(
    pairs: Pairs, read: Callable[[int, IntArray], npt.NDArray[Value]], kind: type[Value]
) -> npt.NDArray[Value]:
    """Reads one value per pair, [n], view by view."""
    if len(pairs.by_view) == 1:
        return read(pairs.by_view[0][0], pairs.position)
    values: npt.NDArray[Value] = np.empty(len(pairs), kind)
    for view, places, position in pairs.samples():
        values[places] = read(view, position)
    return values
