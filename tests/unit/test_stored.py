"""Answers whether a store on disk is read by others as it was written, and never silently wrong.

Does not use a teacher: rows are arithmetic and name their view and sample.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krd_ray.config import RunConfig
from krd_ray.data.shard_set import ShardSet
from krd_ray.errors import ConfigError, DataError, TeacherError
from krd_ray.maths.views import ViewSpec
from krd_ray.teacher.homes import home_of
from krd_ray.teacher.spec import TeacherSpec, store_folder, store_key
from krd_ray.teacher.store import RowArray, TargetStore
from krd_ray.teacher.stored import StoreReader
from krd_ray.train.fill import fill_targets
from tests.unit.run_builders import raw_run

WIDTH, HASH = 8, "a" * 32
IDS = np.arange(100, dtype=np.int64) * 7 + 3
PATIENCE_S = 20.0


def spec_in(folder: Path, num_replicas: int = 1) -> TeacherSpec:
    return TeacherSpec(
        weights="",
        model=None,
        view=ViewSpec("pad_crop", 8, 0, (0.5,) * 3, (0.25,) * 3),
        shards=ShardSet("", (), (), (), 8, False),
        dataset_hash="images",
        class_counts=(5, 5),
        replica=0,
        num_replicas=num_replicas,
        micro_batch=16,
        queue_rows=64,
        memory_bytes=0,
        disk_bytes=1 << 20,
        persist=True,
        precision="fp32",
        compile="off",
        num_threads=1,
        device="cpu",
        store_dir=str(folder),
        run_dir=str(folder),
        calibration="",
    )


def values_of(view: int, ids: np.ndarray) -> RowArray:
    return (view * 1000 + ids[:, None] + np.arange(WIDTH) / 16).astype(np.float16)


def write(
    spec: TeacherSpec, views: dict[int, np.ndarray], *, replica: int = 0, disk_rows: int = 4000
) -> None:
    """What a replica keeps when it was asked for its own among these ids, view by view."""
    mine = IDS[home_of(IDS, spec.num_replicas) == replica]
    store = TargetStore(
        store_folder(spec, HASH, replica),
        store_key(spec, HASH),
        mine,
        WIDTH,
        memory_bytes=0,
        disk_bytes=disk_rows * WIDTH * 2,
        persist=True,
    )
    for view, ids in views.items():
        own = ids[home_of(ids, spec.num_replicas) == replica]
        store.put(view, store.index(own), values_of(view, own))


def reader_of(spec: TeacherSpec, replica: int = 0, teacher_hash: str = HASH) -> StoreReader:
    return StoreReader(spec, teacher_hash, replica, IDS, WIDTH)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_rows_are_read_as_they_were_written_in_any_order_of_views_and_samples(
    tmp_path: Path, num_replicas: int
) -> None:
    spec, draws = spec_in(tmp_path, num_replicas), np.random.default_rng(0)
    for replica in range(num_replicas):
        write(spec, {0: draws.permutation(IDS), 3: draws.permutation(IDS)}, replica=replica, disk_rows=280)
        mine = IDS[home_of(IDS, num_replicas) == replica]
        ids, views = draws.choice(mine, 150), draws.choice([0, 3], 150)
        expected = np.where((views == 0)[:, None], values_of(0, ids), values_of(3, ids))
        read = reader_of(spec, replica)
        assert read(views, ids).tobytes() == expected.tobytes()
        read.require([0, 3])
        assert len(list(store_folder(spec, HASH, replica).glob("page-*"))) > 1


@pytest.mark.parametrize("other", ["nothing written", "hash", "dataset", "replicas"])
def test_a_store_of_another_teacher_dataset_or_split_does_not_exist(tmp_path: Path, other: str) -> None:
    spec = spec_in(tmp_path)
    if other != "nothing written":
        write(spec, {0: IDS})
        reader_of(spec)
    asked = {"dataset": replace(spec, dataset_hash="others"), "replicas": spec_in(tmp_path, 2)}.get(
        other, spec
    )
    with pytest.raises(TeacherError, match=r"holds no targets of this teacher .* `krd targets CONFIG`"):
        reader_of(asked, teacher_hash="b" * 32 if other == "hash" else HASH)


def test_what_a_store_lacks_is_named_before_training_and_when_it_is_asked_for(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    write(spec, {0: IDS, 1: IDS[:60]})
    read = reader_of(spec)
    read.require([0])
    with pytest.raises(TeacherError, match=f"lacks view 1 of sample {IDS[60]}; run `krd targets CONFIG`"):
        read(np.ones(10, np.int64), IDS[55:65])
    with pytest.raises(TeacherError, match=f"lacks view 1 of 40 samples, first {IDS[60]}; run `krd targets"):
        read.require([0, 1])
    for ask in (lambda: read(np.array([0, 2]), IDS[:2]), lambda: read.require([0, 2])):
        with pytest.raises(TeacherError, match="lacks view 2; run `krd targets"):
            ask()
    assert read(np.ones(60, np.int64), IDS[:60]).tobytes() == values_of(1, IDS[:60]).tobytes()


def test_a_view_that_was_dropped_for_want_of_room_is_missed_not_replaced(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    write(spec, {0: IDS, 1: IDS}, disk_rows=120)
    read = reader_of(spec)
    for ask in (lambda: read(np.zeros(10, np.int64), IDS[:10]), lambda: read.require([1, 0])):
        with pytest.raises(TeacherError, match=r"page-0\.f16 is gone.* teacher\.disk_bytes .*`krd targets"):
            ask()
    assert read(np.ones(10, np.int64), IDS[90:]).tobytes() == values_of(1, IDS[90:]).tobytes()


@pytest.mark.parametrize("unknown", [-1, 4, 10**9])
def test_an_id_of_other_images_is_refused_and_not_mistaken_for_a_neighbour(
    tmp_path: Path, unknown: int
) -> None:
    spec = spec_in(tmp_path)
    write(spec, {0: IDS})
    with pytest.raises(DataError, match=f"sample {unknown} is not in the shards"):
        reader_of(spec)(np.zeros(2, np.int64), np.array([IDS[5], unknown]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher is null"),
        ({"views": {}}, r"set views\.cycle to the number of views to store$"),
        ({"teacher": {"weights": "w", "persist": True}}, r"set teacher\.spill_dir to the store's folder$"),
        (
            {"teacher": {"weights": "w"}, "views": {}},
            r"set views\.cycle .*; set teacher\.persist to true; set teacher\.spill_dir",
        ),
    ],
    ids=["no teacher", "endless views", "no folder", "all missing"],
)
def test_only_a_config_that_later_runs_can_read_from_is_filled(changes: dict[str, Any], message: str) -> None:
    teacher = {"weights": "w", "persist": True, "spill_dir": "store"}
    config = RunConfig.model_validate(raw_run(teacher=teacher, views={"cycle": 2}) | changes)
    with pytest.raises(ConfigError, match=message):
        fill_targets(config, print)


WRITER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from krd_ray.teacher.store import TargetStore

    ids = np.arange(100, dtype=np.int64) * 7 + 3
    store = TargetStore(Path(sys.argv[1]), sys.argv[2], ids, 8, memory_bytes=0, disk_bytes=1600, persist=True)
    print("ready", flush=True)
    for start in range(0, 100, 4):
        sys.stdin.readline()
        part = slice(start, start + 4)
        store.put(0, np.arange(100)[part], (ids[part, None] + np.arange(8) / 16).astype(np.float16))
        print(start + 4, flush=True)
"""


def test_one_process_reads_what_another_is_still_writing(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    words = [
        sys.executable,
        "-c",
        textwrap.dedent(WRITER),
        str(store_folder(spec, HASH, 0)),
        store_key(spec, HASH),
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        read, deadline = reader_of(spec), time.monotonic() + PATIENCE_S
        for number in range(25):
            absent = IDS[4 * number : 4 * number + 4]
            lacking = f"lacks view 0 of sample {absent[0]}" if number else "lacks view 0;"
            with pytest.raises(TeacherError, match=lacking):
                read(np.zeros(4, np.int64), absent)
            writer.stdin.write("go on\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == f"{4 * number + 4}\n"
            first = max(0, 4 * number - 60)  # older ones may have been dropped
            seen = IDS[first : 4 * number + 4]
            assert read(np.zeros(len(seen), np.int64), seen).tobytes() == values_of(0, seen).tobytes()
        assert time.monotonic() < deadline
    assert writer.returncode == 0
