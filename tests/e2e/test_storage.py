"""Answers whether a run survives its machine when shards, weights, store and run directory lie at URIs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.e2e import conftest
from tests.e2e.conftest import krd, rows_of, start_krd, wait_for

pytestmark = pytest.mark.timeout(600)
EPOCHS = 12


def test_run_at_a_uri_goes_on_where_nothing_of_it_was_left(
    distill_config: Callable[..., Path],
    shards: Path,
    teacher_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`file://` stands for a bucket: only the file system differs. No process works in the bucket's folder itself."""
    scratch, bucket = tmp_path / "scratch", tmp_path / "bucket"
    monkeypatch.setitem(os.environ, "KRD_SCRATCH", str(scratch))
    shutil.copytree(shards, bucket / "shards")
    place = f"file://{bucket}/run"
    config = distill_config(
        [{"name": "small", "model": "digits_net_4"}],
        run_dir=place,
        data={"dir": f"file://{bucket}/shards", "cache": "stream"},
        views={"cycle": 1},
        teacher={
            "weights": f"file://{teacher_weights}",
            "persist": True,
            "spill_dir": f"file://{bucket}/store",
        },
        train={"epochs": EPOCHS, "val_every_epochs": EPOCHS},
    )
    assert yaml.safe_load(config.read_text())["run_dir"] == place

    monkeypatch.setitem(conftest.ENVIRONMENT, "KRD_SCRATCH", str(scratch))
    process = start_krd("distill", config)
    run = bucket / "run"
    checkpoints = run / "students/small/checkpoints"
    wait_for(lambda: len(list(checkpoints.glob("epoch-*.pt"))) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for each in family:  # a machine dies as a whole
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, timeout=60)
    assert (run / "config.yaml").is_file()
    shutil.rmtree(scratch)  # another machine

    done = krd("distill", "--resume", place)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = rows_of(run, "small", "start")
    assert len(starts) == 2
    assert 2 <= starts[1]["epoch"] <= EPOCHS
    covered = rows_of(run, "small", "coverage")
    assert {row["epoch"] for row in covered} == set(range(EPOCHS))
    assert {(row["missed"], row["doubled"]) for row in covered} == {(0, 0)}
    assert json.loads((run / "students/small/result.json").read_text())["status"] == "finished"
    assert json.loads((run / "ledger.json").read_text())["forwards_per_unique_view"] is not None
    for name in ("students/small/model.safetensors", "teacher/selftest.json", "report/index.html"):
        assert (run / name).is_file(), name
    assert [path.suffix for path in (bucket / "store/archives").iterdir()] == [".tar"]
    assert list((scratch / "work").iterdir()) == []

    again = krd("distill", config)
    assert again.returncode == 1
    assert f"{place} holds a run already" in again.stderr
