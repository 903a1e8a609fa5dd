"""Answers which kinds of image source exist and what each one needs to be opened.

Reads nothing itself: the readers are in `source_arrays.py`, `source_files.py` and `source_parquet.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from krd_ray.data.source_arrays import open_cifar, open_digits
from krd_ray.data.source_contract import RawSample, Source
from krd_ray.data.source_files import open_folder, open_list
from krd_ray.data.source_parquet import open_parquet
from krd_ray.errors import ConfigError

__all__ = ["SOURCES", "RawSample", "Source", "SourceRecord", "SourceSpec", "list_sources", "open_source"]


@dataclass(frozen=True)
class SourceSpec:
    """Where a source is and how to read it; None or False means not given; `SOURCES` says who takes what."""

    kind: str
    path: Path | None = None
    test_path: Path | None = None
    train_list: Path | None = None
    test_list: Path | None = None
    class_names: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    rank_column: str | None = None
    download: bool = False


@dataclass(frozen=True)
class SourceRecord:
    """One kind of source: how to open it, what it needs, what else it takes, and what it reads."""

    fn: Callable[[SourceSpec], Source]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    source: str


def open_source(spec: SourceSpec) -> Source:
    """Open a source by its kind.

    Args:
        spec: the kind and its settings.
    Returns:
        The opened source; labels are read, images are not.
    Raises:
        ConfigError: unknown kind, a needed setting is missing, or a given one means nothing to this kind.
        DataError: what the settings point to cannot be read.
    Example:
        >>> open_source(SourceSpec(kind="digits")).classes[:3]
        ['0', '1', '2']
    """
    record = SOURCES.get(spec.kind)
    if record is None:
        near = get_close_matches(spec.kind, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"source kind must be one of {', '.join(SOURCES)}, got {spec.kind!r}{hint}")
    given = {
        item.name
        for item in fields(spec)
        if item.name != "kind" and getattr(spec, item.name) not in (None, False)
    }
    for name in record.needs:
        if name not in given:
            raise ConfigError(f"source {spec.kind!r} needs {name}, which is not set")
    for name in sorted(given - set(record.needs) - set(record.takes)):
        takes = ", ".join(record.needs + record.takes) or "no setting"
        raise ConfigError(f"{name} means nothing to source {spec.kind!r}, which takes {takes}: remove it")
    return record.fn(spec)


def list_sources() -> list[str]:
    """Names of all kinds of source.

    Returns:
        The registry's keys, in its order.
    Example:
        >>> list_sources()[0]
        'digits'
    """
    return list(SOURCES)


def _given(path: Path | None) -> Path:
    assert path is not None, "open_source checks `needs` first"
    return path


def _open_list(spec: SourceSpec) -> Source:
    return open_list(_given(spec.path), _given(spec.train_list), spec.test_list, spec.class_names)


def _open_parquet(spec: SourceSpec) -> Source:
    return open_parquet(
        _given(spec.path),
        spec.test_path,
        image_column=spec.image_column or "image",
        label_column=spec.label_column or "label",
        rank_column=spec.rank_column,
        class_names=spec.class_names,
    )


SOURCES: dict[str, SourceRecord] = {
    "digits": SourceRecord(
        fn=lambda spec: open_digits(),  # noqa: ARG005
        needs=(),
        takes=(),
        source="scikit-learn's bundled digits, 1797 images of 8x8, no download",
    ),
    "cifar10": SourceRecord(
        fn=lambda spec: open_cifar("cifar10", _given(spec.path), download=spec.download),
        needs=("path",),
        takes=("download",),
        source="torchvision's CIFAR-10 folder (Krizhevsky 2009)",
    ),
    "cifar100": SourceRecord(
        fn=lambda spec: open_cifar("cifar100", _given(spec.path), download=spec.download),
        needs=("path",),
        takes=("download",),
        source="torchvision's CIFAR-100 folder (Krizhevsky 2009)",
    ),
    "folder": SourceRecord(
        fn=lambda spec: open_folder(_given(spec.path), spec.test_path),
        needs=("path",),
        takes=("test_path",),
        source="image files as class/xxx.jpg, optionally below train/ and test/ or val/",
    ),
    "list": SourceRecord(
        fn=_open_list,
        needs=("path", "train_list"),
        takes=("test_list", "class_names"),
        source="`path label` lists, the form of ImageNet-LT, Places-LT and iNaturalist splits",
    ),
    "parquet": SourceRecord(
        fn=_open_parquet,
        needs=("path",),
        takes=("test_path", "image_column", "label_column", "rank_column", "class_names"),
        source="Parquet files with image bytes (flat or Hugging Face form) and integer labels",
    ),
}
