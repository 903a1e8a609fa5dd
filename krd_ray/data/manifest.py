"""Answers what a folder of shards promises in `dataset.json`: classes, splits, preprocessing, checksums.

Does not look at the shards themselves: `krd_ray.data.verify` compares them with what is promised here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from krd_ray.atomic import write_text
from krd_ray.errors import DataError
from krd_ray.maths.longtail import ClassOrder, ValPolicy, shot_groups
from krd_ray.storage.places import Folder, join

MANIFEST_FILE = "dataset.json"
NUM_ERRORS_SHOWN = 3

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Store = Literal["encoded", "raw"]
Scalar = str | int | float | bool | None
Count = Annotated[int, Field(ge=0)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    """Shared settings only: unknown keys refused, values never coerced, instances immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ImageSpec(_Strict):
    """How an image is stored, and the size it is decoded to (encoded ones keep their own size in the "
    "shard)."""

    store: Store
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    channels: Literal[3] = 3


class LongTailSpec(_Strict):
    """How the train split's class counts came about; n_max is the resolved head count."""

    profile: Literal["exponential", "source"]
    imbalance_ratio: float | None
    n_max: int | None
    seed: int
    class_order: ClassOrder
    val_policy: ValPolicy
    val_per_class: Count


class ShardRecord(_Strict):
    """One Parquet file: `row_groups` are rows per row group, `sha256` is over the file's bytes."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.parquet$")]
    num_rows: Annotated[int, Field(ge=1)]
    row_groups: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    num_bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @model_validator(mode="after")
    def _rows_add_up(self) -> ShardRecord:
        if sum(self.row_groups) != self.num_rows:
            raise ValueError(
                f"row_groups of {self.file} add up to {sum(self.row_groups)}, num_rows is {self.num_rows}"
            )
        return self


class SplitRecord(_Strict):
    """One split: images per class [C], and its shards in reading order."""

    num_rows: Annotated[int, Field(ge=1)]
    class_counts: list[Count]
    shards: Annotated[list[ShardRecord], Field(min_length=1)]

    @model_validator(mode="after")
    def _rows_add_up(self) -> SplitRecord:
        for name, total in (
            ("class_counts", sum(self.class_counts)),
            ("the shards' num_rows", sum(shard.num_rows for shard in self.shards)),
        ):
            if total != self.num_rows:
                raise ValueError(f"{name} add up to {total}, num_rows is {self.num_rows}")
        return self


class Manifest(_Strict):
    """Everything a reader needs to know before it opens a shard.

    Fields: mean and std [3] are over the train split's RGB in [0, 1] at the decode size; `source` names the
    source without any machine's folders; `options` are the settings that `krd shards` was called with.
    A split without images (no validation asked for) is absent from `splits`.
    """

    format: Literal["krd-shards/1"] = "krd-shards/1"
    source: dict[str, str | int]
    options: dict[str, Scalar]
    classes: Annotated[list[str], Field(min_length=1)]
    num_classes: int
    image: ImageSpec
    mean: Annotated[list[UnitFloat], Field(min_length=3, max_length=3)]
    std: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]
    long_tail: LongTailSpec
    splits: dict[str, SplitRecord]
    num_skipped: Count
    warnings: list[str]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        if self.num_classes != len(self.classes):
            raise ValueError(f"num_classes is {self.num_classes} but classes has {len(self.classes)} names")
        if "train" not in self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"splits must be train and perhaps val and test, not {sorted(self.splits)}")
        for name, split in self.splits.items():
            if len(split.class_counts) != self.num_classes:
                raise ValueError(
                    f"splits.{name}.class_counts has {len(split.class_counts)} of {self.num_classes} classes"
                )
        files = [shard.file for split in self.splits.values() for shard in split.shards]
        if len(set(files)) != len(files):
            raise ValueError("two shards share one file name")
        return self

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 that changes whenever a stored image, label or the preprocessing changes."""
        content = {
            "shards": {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()},
            "classes": self.classes,
            "image": self.image.model_dump(),
            "mean": self.mean,
            "std": self.std,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def group_sizes(self) -> dict[str, int]:
        """Number of many-, medium- and few-shot classes, by the train split's counts."""
        groups = shot_groups(np.array(self.splits["train"].class_counts))
        return {name: int(mask.sum()) for name, mask in groups.items()}

    def lines(self) -> list[str]:
        """Returns what was written, for people: a line per split and one of classes per group."""
        splits = [
            f"{name}: {split.num_rows:,} images in {len(split.shards)} shard(s)"
            for name, split in self.splits.items()
        ]
        groups = ", ".join(f"{group} {number}" for group, number in self.group_sizes().items())
        return [*splits, f"classes per group: {groups}"]

    def save(self, root: Path) -> Path:
        """Write `dataset.json` so that a reader sees the old file or the new one, never half of one.

        Args:
            root: existing folder of the shards.
        Returns:
            The file's path.
        """
        path = root / MANIFEST_FILE
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path

    @classmethod
    def load(cls, root: Path | str) -> Manifest:
        """Read and check `dataset.json`.

        Args:
            root: folder of the shards, or its URI.
        Returns:
            The manifest, consistent in itself.
        Raises:
            DataError: missing, unreadable, not JSON, or not what this version's format asks for.
        """
        path = join(str(root), MANIFEST_FILE)
        try:
            with Folder.at(root).open(MANIFEST_FILE) as file:
                text = file.read().decode("utf-8")
        except FileNotFoundError as error:
            raise DataError(
                f"no {MANIFEST_FILE} in {root}: it is written last, so this is either no folder of shards "
                "or one "
                "whose writing was interrupted; write it with `krd shards`"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read {path}: {error}; check that this node reaches it, or write it again with `krd shards`"
            ) from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{path} is not a valid krd-shards/1 manifest: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    shown = [
        f"{'.'.join(str(part) for part in item['loc']) or 'the file'}: {item['msg']}"
        for item in error.errors()[:NUM_ERRORS_SHOWN]
    ]
    more = error.error_count() - len(shown)
    return (
        "; ".join(shown) + (f"; and {more} more" if more > 0 else "") + "; write it again with `krd shards`"
    )
