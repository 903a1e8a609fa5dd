"""Answers how a source becomes a folder of shards: long-tailed, shuffled, checked, with a manifest beside it.

Does not read shards back for training (the stream does) and knows no kind of source by name.
Files: `train-00000.parquet`, `val-...`, `test-...`, and `dataset.json`, written last. An interrupted write
leaves the folder `.partial` behind; the next call starts over.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from krd_ray.atomic import sync
from krd_ray.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    Scalar,
    ShardRecord,
    SplitRecord,
)
from krd_ray.data.shard_first_pass import FirstPass, Router, shard_name
from krd_ray.data.shard_options import OnBadSample, ShardOptions
from krd_ray.data.shard_spill import Spill, write_shard
from krd_ray.data.shard_splits import SplitPlan, plan_splits, refuse_empty
from krd_ray.data.source_contract import Source, check_labels
from krd_ray.data.verify import verify_dataset
from krd_ray.errors import DataError
from krd_ray.maths.longtail import IntArray
from krd_ray.storage.places import absolute
from krd_ray.storage.working_copy import WorkingCopy

__all__ = ["OnBadSample", "ShardOptions", "write_shards", "write_shards_at"]

log = logging.getLogger(__name__)

PARTIAL_FOLDER = ".partial"
BUFFER_BYTES = 64 << 20
_SHARD_FILE = re.compile(r"(train|val|test)-\d{5}\.parquet")


@dataclass(frozen=True)
class _Request:
    """What was asked for, in the words of the manifest, and the labels it rests on."""

    description: dict[str, str | int]
    options: dict[str, Scalar]
    train_labels: IntArray
    test_labels: IntArray
    ranks: IntArray | None

    @classmethod
    def of(cls, source: Source, options: ShardOptions) -> _Request:
        train, test, ranks = source.train_labels(), source.test_labels(), source.train_ranks()
        check_labels(train, source.classes, "train set")
        check_labels(test, source.classes, "test set")
        digest = hashlib.sha256()
        for labels in (train, test, np.empty(0) if ranks is None else ranks):
            digest.update(f"{len(labels)}:".encode() + np.ascontiguousarray(labels, dtype="<i8").tobytes())
        description = {
            **source.describe(),
            "num_train_rows": len(train),
            "num_test_rows": len(test),
            "labels_sha256": digest.hexdigest(),
        }
        return cls(description, asdict(options), train, test, ranks)


def write_shards(
    source: Source, out_dir: Path, options: ShardOptions, *, overwrite: bool = False
) -> Manifest:
    """Write a source as shuffled Parquet shards with `dataset.json`; the same input gives the same bytes.

    sample_id is the row's index in the source's train enumeration, whatever the long tail; images of the
    source's own test set continue after the last train row.
    Memory: one shard, the buffers, a few images and some 30 bytes per source row. Disk: twice the result.
    If `out_dir` already holds the same source with the same options, it is verified in full and kept. Images
    that changed in place under unchanged labels are not noticed then: use overwrite.

    Args:
        source: what to write.
        out_dir: folder of the shards; created, or empty, or an earlier result.
        options: how.
        overwrite: replace an earlier, different result; other files in the folder stay.
    Returns:
        The manifest, as saved.
    Raises:
        DataError: bad images or labels, an empty class, or a folder that holds something else.
        ConfigError: options contradict each other.
    """
    request = _Request.of(source, options)
    try:
        existing = _existing(out_dir, request, overwrite=overwrite)
        if existing is not None:
            return existing
        plan = plan_splits(
            source.classes,
            request.train_labels,
            request.ranks,
            has_test=len(request.test_labels) > 0,
            options=options,
        )
        _start(out_dir)
        manifest = _write(source, request, plan, out_dir, options)
        manifest.save(out_dir)
        shutil.rmtree(out_dir / PARTIAL_FOLDER)
    except OSError as error:
        raise DataError(
            f"cannot write shards to {out_dir}: {error}; free space or choose another folder "
            f"(what is unfinished there is removed by the next call)"
        ) from error
    return manifest


def write_shards_at(
    source: Source, place: str, options: ShardOptions, *, overwrite: bool = False
) -> Manifest:
    """Write shards as `write_shards` does, to a folder or to a URI.

    For a URI they are written on this node first and then copied there, the manifest last; what lies there already
    is brought here to be verified.

    Args:
        source, options, overwrite: as for `write_shards`.
        place: folder or URI.
    Returns:
        The manifest.
    Raises:
        DataError, ConfigError: as `write_shards`.
        StorageError: the URI cannot be read or written.
    """
    copy = WorkingCopy(absolute(place), skip=(f"{PARTIAL_FOLDER}/*",))
    try:
        copy.pull()
        with copy.errors_named():
            manifest = write_shards(source, copy.path, options, overwrite=overwrite)
        copy.push()
    finally:
        copy.discard()
    return manifest


def _existing(out_dir: Path, request: _Request, *, overwrite: bool) -> Manifest | None:
    """The finished result of the same request, or None when the folder may be written to."""
    if not out_dir.exists() or overwrite:
        return None
    if (out_dir / MANIFEST_FILE).exists():
        manifest = Manifest.load(out_dir)
        asked: dict[str, object] = {**request.description, **request.options}
        found: dict[str, object] = {**manifest.source, **manifest.options}
        different = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
        if different:
            shown = ", ".join(
                f"{name} {found.get(name)!r} there, {asked.get(name)!r} now" for name in different
            )
            raise DataError(
                f"{out_dir} already holds other shards ({shown}): choose another folder, or overwrite them"
            )
        log.info("%s already holds these shards; verifying them", out_dir)
        return verify_dataset(out_dir, full=True)
    foreign = [entry.name for entry in out_dir.iterdir() if entry.name != PARTIAL_FOLDER]
    if foreign and not (out_dir / PARTIAL_FOLDER).exists():
        raise DataError(
            f"{out_dir} is not empty (it holds {sorted(foreign)[0]!r}) and has no {MANIFEST_FILE}: "
            "choose an empty folder, or overwrite to write beside what is there"
        )
    return None


def _start(out_dir: Path) -> None:
    """Mark the folder as being written, then remove an earlier result, known by its file names."""
    partial = out_dir / PARTIAL_FOLDER
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (out_dir / MANIFEST_FILE).unlink(missing_ok=True)
    for entry in sorted(out_dir.iterdir()):
        if _SHARD_FILE.fullmatch(entry.name):
            entry.unlink()


def _write(
    source: Source, request: _Request, plan: SplitPlan, out_dir: Path, options: ShardOptions
) -> Manifest:
    router = Router.of(plan, len(request.test_labels), options)
    spill = Spill(out_dir / PARTIAL_FOLDER, BUFFER_BYTES)
    first_pass = FirstPass(source.classes, options, request.train_labels, request.test_labels)
    first_pass.run(source, router, spill)
    refuse_empty(source.classes, np.flatnonzero(first_pass.counts["train"]), "left after skipping bad ones")
    mean, std = first_pass.statistics()
    return Manifest(
        source=request.description,
        options=request.options,
        classes=list(source.classes),
        num_classes=len(source.classes),
        image=first_pass.image_spec(),
        mean=mean,
        std=std,
        long_tail=plan.long_tail,
        splits=_second_pass(spill, router, first_pass, out_dir, options.row_group_rows),
        num_skipped=first_pass.num_skipped,
        warnings=plan.warnings + first_pass.warnings(),
    )


def _second_pass(
    spill: Spill, router: Router, first_pass: FirstPass, out_dir: Path, row_group_rows: int
) -> dict[str, SplitRecord]:
    """Phase two for every shard that got a row; a split without rows is left out."""
    image = first_pass.image_spec()
    records: dict[str, SplitRecord] = {}
    for split in SPLITS:
        shards: list[ShardRecord] = []
        for shard in range(router.num_shards[split]):
            spilled = spill.path(shard_name(split, shard))
            if spilled.exists():
                out_file = out_dir / f"{shard_name(split, len(shards))}.parquet"
                shards.append(write_shard(spilled, out_file, image, row_group_rows))
        counts = first_pass.counts[split].tolist()
        if shards:
            records[split] = SplitRecord(num_rows=sum(counts), class_counts=counts, shards=shards)
            log.info("%s: %d images in %d shards", split, sum(counts), len(shards))
    sync(out_dir)
    return records
