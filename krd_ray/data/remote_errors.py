"""Answers which of krd_ray's own errors stands behind what Ray raises for a failed task or actor call.

Does not decide what to do about it. Ray wraps an error once per process and layer it passes, traceback and all;
the message made for people is the innermost one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError, RayTaskError

from krd_ray.errors import KrdError


def own_error(error: BaseException) -> KrdError | None:
    """Returns the KrdError that a Ray error was caused by, as it was raised; None if it was something else.

    Example:
        >>> inner = KrdError("out of paper")
        >>> own_error(RayTaskError("print_page", "Traceback ...", inner)) is inner
        True
        >>> own_error(RayTaskError("print_page", "Traceback ...", ValueError("no"))) is None
        True
    """
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        if isinstance(now, KrdError) and not isinstance(now, RayTaskError):
            return now
        now = now.cause if isinstance(now, RayTaskError) else now.__cause__
    return None


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raises a KrdError from another process as itself; other errors of Ray pass as they are."""
    try:
        yield
    except RayError as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from None
