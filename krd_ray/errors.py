"""Answers which errors krd_ray raises on purpose, and what each one tells the person who meets it.

Does not handle errors: the layer that can do something about one catches it.
Every message says what happened, what was expected, where, and what to do.
"""

from __future__ import annotations


class KrdError(Exception):
    """Base of every error that krd_ray raises on purpose; the CLI prints it without a traceback.

    Takes exactly one argument, the message, so that it survives pickling between Ray actors.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[KrdError], tuple[str]]:
        return (type(self), (self.message,))


class ConfigError(KrdError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class DataError(KrdError):
    """A shard, an image or a label is not what the manifest or the format promises."""


class StorageError(KrdError):
    """A file at a URI cannot be read or written."""


class ShapeError(KrdError):
    """Two tensors that must agree in shape do not."""


class ResourceError(KrdError):
    """The cluster cannot hold what the run asks for."""


class TeacherError(KrdError):
    """The teacher's weights, its self-test or one of its answers is not usable."""


class NonFiniteLossError(KrdError):
    """A loss became NaN or infinite; the last good checkpoint stays."""


class Interrupted(KrdError):
    """The person or the machine asked the driver to stop (SIGINT, SIGTERM)."""


class DiskFullError(KrdError):
    """A file could not be written: its disk, or the user's share of it, is full."""


class RunError(KrdError):
    """A run directory cannot be used, or at least one student did not finish."""
