"""Broken facts are found, each with the sentence and the command that mends it; good ones are not complained of."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from krd_ray.doctor import examiner
from krd_ray.doctor.checks import CHECKS, GIB, MIB, Finding, judge
from krd_ray.doctor.command import show
from krd_ray.doctor.facts import NodeFacts

HERE = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0", "krd_ray": "0.1.0"}
GOOD = NodeFacts(
    name="10.0.0.1",
    versions=HERE,
    ray_gpus=1.0,
    torch_gpus=1,
    torch_cuda="12.8",
    object_store_bytes=20 * GIB,
    memory_bytes=64 * GIB,
    shared_memory_bytes=32 * GIB,
    disk_path="/tmp/ray/session",
    disk_total_bytes=100 * GIB,
    disk_free_bytes=50 * GIB,
    has_token=True,
    open_ports={"raylet": [6380], "gcs_server": [6379]},
    dashboard="127.0.0.1:8265",
    clock_offset_s=0.002,
    clock_bound_s=0.003,
    cannot_write="",
    cannot_read_data="",
)


def found(**changes: Any) -> list[Finding]:
    """What is not ok about two nodes, the second of which is broken."""
    broken = replace(GOOD, name="10.0.0.2", **changes)
    findings = judge([GOOD, broken], HERE)
    assert all(each.level == "ok" for each in findings if each.node == GOOD.name)
    return [each for each in findings if each.level != "ok"]


def test_good_cluster_has_every_check_on_every_node_and_no_complaint() -> None:
    findings = judge([GOOD, replace(GOOD, name="10.0.0.2")], HERE)
    assert {each.level for each in findings} == {"ok"}
    assert len(findings) == 2 * (1 + len(CHECKS))


@pytest.mark.parametrize(
    ("changes", "check", "level", "text", "mend"),
    [
        (
            {"versions": {**HERE, "torch": "2.12.0"}},
            "versions",
            "wrong",
            "torch 2.12.0 (here 2.13.0)",
            "torch==2.13.0",
        ),
        ({"versions": {**HERE, "krd_ray": "none"}}, "versions", "wrong", "krd_ray none", "the same krd_ray"),
        ({"versions": {**HERE, "python": "3.12.1"}}, "versions", "wrong", "python 3.12.1", "Python 3.11.2"),
        ({"torch_gpus": 0}, "GPUs", "wrong", "promises 1 GPU, torch sees 0", "--num-gpus=0"),
        (
            {"torch_gpus": 0, "torch_cuda": None},
            "GPUs",
            "wrong",
            "built without CUDA",
            "a CUDA build of torch",
        ),
        ({"torch_gpus": 2}, "GPUs", "warning", "torch sees 2 GPU", "--num-gpus=2"),
        ({"clock_offset_s": -30.0}, "clock", "wrong", "30.0 s (+- 0.003 s) behind", "set-ntp"),
        ({"clock_offset_s": 2.0}, "clock", "warning", "2.0 s (+- 0.003 s) ahead of", "set-ntp"),
        ({"disk_free_bytes": GIB // 2}, "disk", "wrong", "0.5 of 100.0 GiB", "--temp-dir"),
        (
            {"disk_free_bytes": 40 * GIB, "disk_total_bytes": 1000 * GIB},
            "disk",
            "wrong",
            "40.0 of 1000.0",
            "--temp-dir",
        ),
        ({"disk_free_bytes": 9 * GIB}, "disk", "warning", "9.0 of 100.0 GiB", "--temp-dir"),
        (
            {"object_store_bytes": 80 * MIB},
            "object store",
            "wrong",
            "80 MiB of 65,536 MiB",
            "--object-store-memory=20615843020",
        ),
        (
            {"object_store_bytes": GIB},
            "object store",
            "warning",
            "read again each epoch",
            "--object-store-memory",
        ),
        ({"shared_memory_bytes": 64 * MIB}, "object store", "warning", "/dev/shm has 64 MiB", "--shm-size"),
        ({"has_token": False}, "ports", "wrong", "gcs_server on 6379, raylet on 6380", "RAY_AUTH_MODE=token"),
        (
            {"dashboard": "10.0.0.2:8265"},
            "ports",
            "warning",
            "dashboard listens",
            "--dashboard-host=127.0.0.1",
        ),
        (
            {"cannot_write": "OSError: no"},
            "shared",
            "wrong",
            "a file there: OSError: no",
            "mount the same storage",
        ),
        (
            {"cannot_read": {"10.0.0.1": "no such file"}},
            "shared",
            "wrong",
            "what 10.0.0.1 wrote: no such file",
            "mount",
        ),
        ({"cannot_write": None}, "shared", "warning", "was not checked", "krd doctor --shared"),
        ({"cannot_read_data": "no such file"}, "data", "wrong", "shards are not there", "data.dir"),
        ({"error": "it has died"}, "answers", "wrong", "it does not answer: it has died", "ray status"),
    ],
)
def test_each_fault_is_found_alone_and_with_its_remedy(
    changes: dict[str, Any], check: str, level: str, text: str, mend: str
) -> None:
    (finding,) = found(**changes)
    assert (finding.check, finding.node, finding.level) == (check, "10.0.0.2", level)
    assert text in finding.text
    assert mend in finding.mend


def test_offset_that_a_slow_answer_explains_is_no_fault() -> None:
    assert found(clock_offset_s=5.0, clock_bound_s=4.5) == []
    assert found(has_token=False, open_ports={}) == []


def test_one_node_need_not_share_a_folder() -> None:
    alone = judge([replace(GOOD, cannot_write=None, cannot_read_data=None)], HERE)
    assert {each.level for each in alone} == {"ok"}
    assert not {"shared", "data"} & {each.check for each in alone}


def test_table_has_a_row_per_node_and_each_fault_a_sentence() -> None:
    out = io.StringIO()
    findings = judge([GOOD, replace(GOOD, name="10.0.0.2", torch_gpus=0, disk_free_bytes=9 * GIB)], HERE)
    assert not show(findings, Console(file=out, width=120))
    text = out.getvalue()
    rows = [line for line in text.splitlines() if "10.0.0." in line and "│" in line]
    assert ["wrong" in row for row in rows] == [False, True]
    assert "wrong: 10.0.0.2: Ray promises 1 GPU, torch sees 0\n  mend: `nvidia-smi` there" in text
    assert text.splitlines()[-1] == "16 ok, 1 warning, 1 wrong".replace("16", str(len(findings) - 2))
    assert text.index("wrong: ") < text.index("warning: ")
    assert show([each for each in findings if each.level != "wrong"], Console(file=io.StringIO()))


def test_nodes_of_which_the_same_is_to_be_said_share_a_sentence() -> None:
    out = io.StringIO()
    small = [replace(GOOD, name=f"10.0.0.{number}", object_store_bytes=GIB) for number in (1, 2)]
    assert show(judge(small, HERE), Console(file=out, width=120))
    sentences = [line for line in out.getvalue().splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in sentences] == ["10.0.0.1, 10.0.0.2"]


def test_versions_are_those_of_the_installed_packages() -> None:
    import ray
    import torch

    found = examiner.versions()
    assert found["ray"] == ray.__version__
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", *examiner.PACKAGES}


def test_folder_is_written_read_and_removed_as_two_nodes_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examiner, "READ_TIMEOUT_S", 0.3)
    node, folder = examiner.Examiner(), f"{tmp_path}/.krd-doctor"
    assert node.write(folder, "a") == ""
    assert node.write(folder, "b") == ""
    assert node.read({f"{folder}/a": "a", f"{folder}/b": "b"}) == {}
    (error,) = node.read({f"{folder}/a": "b", f"{folder}/b": None}).values()
    assert "holds something else" in error
    node.remove(folder)
    node.remove(folder)
    assert list(tmp_path.iterdir()) == []
    assert "FileNotFoundError" in node.read({f"{folder}/a": None})[f"{folder}/a"]


def test_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert examiner.Examiner().write(f"{tmp_path}/mount/.krd-doctor", "a") != ""
    assert list(tmp_path.iterdir()) == []
