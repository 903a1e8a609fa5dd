"""Answers which settings turn a source into shards.

Does not say where the source is (`sources.SourceSpec`) or where the shards go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krd_ray.data.manifest import Store
from krd_ray.errors import ConfigError
from krd_ray.maths.longtail import ClassOrder, ValPolicy

OnBadSample = Literal["error", "skip"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "class_order": ("index", "count"),
    "val_policy": ("left_out", "hold_out", "auto"),
    "store": ("encoded", "raw"),
    "on_bad_sample": ("error", "skip"),
}


@dataclass(frozen=True)
class ShardOptions:
    """How to turn a source into shards.

    Fields:
        imbalance_ratio: head over tail count, >= 1; None keeps the source's own distribution.
        n_max: images of the head class; None means all it has.
        seed: of the long-tail draw, the validation draw and the shuffle.
        class_order: which class is the head, see `longtail.profile_counts`.
        val_per_class: validation images per class; 0 writes no validation split.
        val_policy: where they come from, see `longtail.select_validation`.
        store: `encoded` keeps the source's bytes (pixels become PNG), `raw` holds decoded pixels.
        image_size: side of the decoded square; None takes the source's one square size.
        rows_per_shard: upper bound; rows are spread evenly over the shards.
        row_group_rows: rows per Parquet row group.
        on_bad_sample: stop at an unreadable image, or leave it out and count it.
        test_per_class: images per class held out for the test split of a source that has none of its own.
    """

    imbalance_ratio: float | None = None
    n_max: int | None = None
    seed: int = 0
    class_order: ClassOrder = "index"
    val_per_class: int = 10
    val_policy: ValPolicy = "auto"
    store: Store = "encoded"
    image_size: int | None = None
    rows_per_shard: int = 2048
    row_group_rows: int = 512
    on_bad_sample: OnBadSample = "error"
    test_per_class: int = 30

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (
            ("rows_per_shard", 1),
            ("row_group_rows", 1),
            ("test_per_class", 1),
            ("val_per_class", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size must be >= 1 pixel, got {self.image_size}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0 .. 2**32 - 1, got {self.seed}")
