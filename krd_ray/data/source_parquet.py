"""Answers how Parquet files with image bytes and labels, plain or in Hugging Face form, become a source.

Never reads a whole file: labels are one thin column, images come batch by batch out of the row groups needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krd_ray.data.source_contract import RawSample, check_labels
from krd_ray.errors import DataError
from krd_ray.maths.longtail import BoolArray, IntArray

BATCH_ROWS = 256
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetRows:
    """The rows of one or more files in order; labels and ranks cover all of them."""

    files: tuple[Path, ...]
    image_column: str
    labels: IntArray
    ranks: IntArray | None

    def iter(self, selected: BoolArray) -> Iterator[RawSample]:
        """The selected rows; row groups without any are skipped, the others are read in small batches."""
        start = 0
        for path in self.files:
            with _open(path) as file:
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if selected[start : start + num_rows].any():
                        yield from self._iter_group(file, path.name, group, start, selected)
                    start += num_rows

    def _iter_group(
        self, file: pq.ParquetFile, name: str, group: int, start: int, selected: BoolArray
    ) -> Iterator[RawSample]:
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self.image_column]):
                images = _image_bytes(batch.column(0))
                for offset in np.flatnonzero(selected[start : start + len(images)]).tolist():
                    row, image = start + offset, images[offset].as_py()
                    where = f"{name}, row group {group}, source row {row}" + (
                        " (no image bytes)" if image is None else ""
                    )
                    yield RawSample(row, int(self.labels[row]), image, where)
                start += len(images)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name}, row group {group} is damaged: {error}; fetch the file again") from error


@dataclass(frozen=True)
class ParquetSource:
    """A source of Parquet files; `names` are the base names that the manifest records."""

    names: dict[str, str]
    classes: list[str]
    train: ParquetRows = field(repr=False)
    test: ParquetRows | None = field(repr=False)

    def describe(self) -> dict[str, str | int]:
        return {"kind": "parquet", **self.names}

    def train_labels(self) -> IntArray:
        return self.train.labels

    def train_ranks(self) -> IntArray | None:
        return self.train.ranks

    def test_labels(self) -> IntArray:
        return np.empty(0, dtype=np.int64) if self.test is None else self.test.labels

    def iter_train(self, selected: BoolArray) -> Iterator[RawSample]:
        return self.train.iter(selected)

    def iter_test(self) -> Iterator[RawSample]:
        return (
            iter(()) if self.test is None else self.test.iter(np.ones(len(self.test.labels), dtype=np.bool_))
        )


def open_parquet(
    train: Path,
    test: Path | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    rank_column: str | None = None,
    class_names: Path | None = None,
) -> ParquetSource:
    """Source over Parquet files with encoded images and integer labels.

    The image column is `binary`, or `struct<bytes: binary, path: string>` as Hugging Face data sets have it.

    Args:
        train: one file, or a folder whose `*.parquet` files are read in name order.
        test: same; without it the test set is empty.
        image_column: name of the image column.
        label_column: name of the integer label column, labels from 0.
        rank_column: name of a column with each train image's place inside its class (nested subsets).
        class_names: text file with one name per line, in label order. Without it the names in the file's
            Hugging Face metadata are used where there are any, else the labels.
    Returns:
        The source.
    Raises:
        DataError: no file, no such column, a wrong type, a null label, or a label without a name.
    """
    rows = _read_rows(train, image_column, label_column, rank_column)
    test_rows = None if test is None else _read_rows(test, image_column, label_column, None)
    names = {"path": train.resolve().name}
    classes = _read_names(class_names) or _stored_names(rows.files[0], label_column)
    if not classes:
        top = max(int(part.labels.max(initial=-1)) for part in (rows, test_rows) if part is not None)
        classes = [str(c) for c in range(top + 1)]
    check_labels(rows.labels, classes, train.name)
    if test is not None and test_rows is not None:
        names["test_path"] = test.resolve().name
        check_labels(test_rows.labels, classes, test.name)
    return ParquetSource(names, classes, rows, test_rows)


def _open(path: Path) -> pq.ParquetFile:
    try:
        # Without pre-buffering, a row group of any size is read page by page.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error


def _read_rows(path: Path, image_column: str, label_column: str, rank_column: str | None) -> ParquetRows:
    """The labels pass: schema checks, then the thin integer columns of every file."""
    files = tuple(sorted(path.glob("*.parquet"))) if path.is_dir() else (path,)
    if not files:
        raise DataError(f"{path} holds no *.parquet file")
    labels: list[IntArray] = []
    ranks: list[IntArray] = []
    for name in files:
        with _open(name) as file:
            _check_image_column(name, file.schema_arrow, image_column)
            labels.append(_read_integers(name, file, label_column, "label_column"))
            if rank_column is not None:
                ranks.append(_read_integers(name, file, rank_column, "rank_column"))
    return ParquetRows(files, image_column, np.concatenate(labels), np.concatenate(ranks) if ranks else None)


def _check_column(path: Path, schema: pa.Schema, column: str, setting: str) -> pa.DataType:
    if column not in schema.names:
        raise DataError(
            f"{path.name} has no column {column!r}, its columns are {schema.names}: set {setting}"
        )
    return schema.field(column).type


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_image_column(path: Path, schema: pa.Schema, column: str) -> None:
    kind = _check_column(path, schema, column, "image_column")
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not _is_binary(kind):
        raise DataError(
            f"{path.name}: column {column!r} is {kind}, expected image bytes: binary or struct<bytes: "
            "binary, ...>"
        )


def _read_integers(path: Path, file: pq.ParquetFile, column: str, setting: str) -> IntArray:
    kind = _check_column(path, file.schema_arrow, column, setting)
    if not pa.types.is_integer(kind):
        raise DataError(f"{path.name}: column {column!r} is {kind}, expected integers: set {setting}")
    try:
        values = file.read(columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: column {column!r} is damaged: {error}; fetch the file again"
        ) from error
    if values.null_count:
        row = int(np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{path.name}, row {row}: column {column!r} is null ({values.null_count} such rows)")
    return np.asarray(values.to_numpy(), dtype=np.int64)


def _image_bytes(column: pa.Array) -> pa.Array:
    """The binary child of the Hugging Face form (null where the struct is), or the column itself."""
    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _read_names(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _stored_names(path: Path, label_column: str) -> list[str]:
    """Class names from the `huggingface` entry of the schema's metadata; empty where there are none."""
    with _open(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if stored is None:
        return []
    try:
        content: Any = json.loads(stored)
        names = content["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError):
        return []  # foreign metadata: labels stand for themselves, as without it
    return [str(name) for name in names] if isinstance(names, list) else []
