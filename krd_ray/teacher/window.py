"""Answers how many batches a worker asks for ahead: enough to hide the latency of an answer, and no more.

Does not ask (`client` does).
"""

from __future__ import annotations

import math

SMALLEST, LARGEST = 2, 8
WAITED_S = 1e-3  # an answer that came sooner was there already
WEIGHT = 0.2  # of the newest measurement in the running mean
PATIENCE = 200  # answers in a row that were there already, before one request fewer is tried


class Window:
    """Size of the window of requests in flight.

        size = ceil(latency / seconds per step) + 1, within [2, 8]

    Both are running means. An answer's latency is known only when it had to be waited for; where none has been, the
    window is large enough as it is, and after 200 such answers one request fewer is tried: at most one wait of less
    than a step in 200 steps is the price of a window that also shrinks.

    Args:
        fixed: a size that never changes; None: measured.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed is not None
        self.size = SMALLEST if fixed is None else fixed
        self._latency_s: float | None = None
        self._step_s: float | None = None
        self._last_end: float | None = None
        self._in_time = 0

    def restart(self) -> None:
        """Takes note that the next question begins an epoch: what lies between two epochs is no step."""
        self._last_end = None

    def learn(self, sent: float, asked: float, answered: float) -> None:
        """Takes note of one answer.

        Args:
            sent: time at which the request left, seconds.
            asked: time at which the answer was first waited for.
            answered: time at which it was there.
        Example:
            >>> window = Window()
            >>> for step in range(20):  # steps of 10 ms, each then waiting 15 ms for an answer sent 38 ms before
            ...     window.learn(0.025 * step - 0.028, 0.025 * step - 0.005, 0.025 * step + 0.01)
            >>> window.size
            5
        """
        if self._fixed:
            return
        if self._last_end is not None:
            self._step_s = _mean(self._step_s, asked - self._last_end)
        begins_epoch, self._last_end = self._last_end is None, answered
        if answered - asked < WAITED_S:
            self._shrink_in_time(asked - sent)
            return
        if not begins_epoch:  # the first answer of an epoch is waited for whatever the window
            self._in_time = 0
        if self._step_s is None:
            return
        self._latency_s = _mean(self._latency_s, answered - sent)
        wanted = math.ceil(self._latency_s / max(self._step_s, 1e-6)) + 1
        self.size = min(max(wanted, SMALLEST), LARGEST)

    def _shrink_in_time(self, at_most_s: float) -> None:
        """An answer that was there already took no longer than its question was out."""
        if self._latency_s is not None:
            self._latency_s = _mean(self._latency_s, min(self._latency_s, at_most_s))
        self._in_time += 1
        if self._in_time == PATIENCE:
            self._in_time = 0
            self.size = max(self.size - 1, SMALLEST)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else (1 - WEIGHT) * before + WEIGHT * value
