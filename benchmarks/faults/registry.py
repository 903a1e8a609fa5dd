"""Answers which faults are tried, and what is promised for each one.

Does not do them (`strikes` does) and does not compare (`verdict` does). A new fault is one record at the bottom.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.faults import strikes
from benchmarks.faults.nodes import Shape
from benchmarks.faults.running import Scene
from benchmarks.faults.setting import STUDENTS

SERVES_AGAIN_S = 15.0
RESUMES_S = 30.0
DISK_BYTES = 48 << 20
EXPLODES_AT = 8


@dataclass(frozen=True)
class Fault:
    """One kind of fault and its promise.

    Args:
        what: is done, in words.
        strike: does it and returns.
        exit_code: of the command that it is done to; 0: the run survives.
        says: texts that the command must print.
        before: the strike comes before the command is started.
        mend: takes the fault's cause away before the command is given again.
        again: how it is given again, and must end with 0; None: not at all.
        equal: students that must end with the weights of the unfaulted run.
        equality: `bits`, or `spread`: within the difference of two unfaulted runs.
        recovered: what ends the time of recovery, see `verdict.RECOVERIES`.
        within_s: bound on it.
        restarts: that the ledger must count, by who; those who are not named may have any number.
        forwards_once: forwards per unique view stays 1.000.
        own_shards: the run reads a copy of the shards.
        disk_bytes: the run directory is on a disk of its own of that size.
        setting: see `setting.STUDENTS`.
        changes: laid over the config.
        nodes: of a cluster that the run joins.
        quick: see `nodes.Nodes`.
    """

    what: str
    strike: strikes.Strike
    recovered: str
    exit_code: int = 0
    says: tuple[str, ...] = ()
    before: bool = False
    mend: Callable[[Scene], None] | None = None
    again: Literal["resume", "start"] | None = None
    equal: tuple[str, ...] = ("hit", "spared")
    equality: Literal["bits", "spread"] = "bits"
    within_s: float | None = None
    restarts: Mapping[str, int] = field(default_factory=dict)
    forwards_once: bool = False
    own_shards: bool = False
    disk_bytes: int | None = None
    setting: str = "two students"
    changes: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, Shape] | None = None
    quick: bool = True

    @property
    def promise(self) -> str:
        """In a word or two, for tables."""
        first = {0: "survives", -9: "killed"}.get(self.exit_code, "stops cleanly")
        return first if self.again is None else f"{first}, {self.again}s"


UNHURT = {"spared": 0}
# All CPUs are on the students' node: shards are read, and their blocks lie, where the students are.
THREE_NODES = {
    "head": Shape({}, num_cpus=0),
    "teachers": Shape({"teaching": 1}, num_cpus=0),
    "students": Shape({"students": 2}, num_cpus=2),
}
ON_THREE_NODES = {
    "teacher": {"resources": {"num_cpus": 0, "custom": {"teaching": 1}}},
    "students": [
        {**each, "resources": {"num_cpus": 0.25, "custom": {"students": 1}}}
        for each in STUDENTS["two students"]
    ],
}
EXPLODING = {"schedule": "step", "milestones": [EXPLODES_AT], "gamma": 1e30}

FAULTS: dict[str, Fault] = {
    "teacher-killed": Fault(
        "kill -9 of the teacher, its store on disk",
        strikes.kill_teacher(1),
        "served",
        within_s=SERVES_AGAIN_S,
        restarts={"teacher": 1, "hit": 0, **UNHURT},
        forwards_once=True,
    ),
    "teacher-killed-memory": Fault(
        "kill -9 of the teacher, its store in memory only",
        strikes.kill_teacher(1),
        "served",
        equality="spread",
        within_s=SERVES_AGAIN_S,
        restarts={"teacher": 1, "hit": 0, **UNHURT},
        changes={"teacher": {"persist": False}},
    ),
    "teacher-killed-twice": Fault(
        "kill -9 of the teacher, and again when it serves again",
        strikes.kill_teacher(2),
        "served",
        within_s=SERVES_AGAIN_S,
        restarts={"teacher": 2, "hit": 0, **UNHURT},
        forwards_once=True,
    ),
    "student-killed": Fault(
        "kill -9 of a student's worker",
        strikes.kill_student,
        "trained",
        restarts={"teacher": 0, "hit": 1, **UNHURT},
        forwards_once=True,
    ),
    "student-of-two-killed": Fault(
        "kill -9 of one of a student's two workers",
        strikes.kill_student,
        "trained",
        restarts={"teacher": 0, "hit": 1},
        equal=("hit",),
        forwards_once=True,
        setting="two workers",
    ),
    "node-of-students-killed": Fault(
        "kill -9 of a node with all students and all cached images; another one joins",
        strikes.lose_node("students"),
        "trained",
        nodes=THREE_NODES,
        changes=ON_THREE_NODES,
    ),
    "node-of-teacher-killed": Fault(
        "kill -9 of the teacher's node; another one joins",
        strikes.lose_node("teachers"),
        "served",
        restarts={"teacher": 1, "hit": 0, **UNHURT},
        forwards_once=True,
        nodes=THREE_NODES,
        changes=ON_THREE_NODES,
    ),
    "driver-killed": Fault(
        "kill -9 of the driver",
        strikes.signal_driver(signal.SIGKILL),
        "resumed",
        exit_code=-9,
        again="resume",
        within_s=RESUMES_S,
        forwards_once=True,
    ),
    "power-loss": Fault(
        "kill -9 of every process at once",
        strikes.kill_everything,
        "resumed",
        exit_code=-9,
        again="resume",
        within_s=RESUMES_S,
        forwards_once=True,
    ),
    "sigterm": Fault(
        "SIGTERM to the driver",
        strikes.signal_driver(signal.SIGTERM),
        "stopped",
        exit_code=130,
        says=("stopped by SIGTERM; the last checkpoint of every student is kept", "krd distill --resume"),
        again="resume",
        forwards_once=True,
    ),
    "object-store-full": Fault(
        "another job puts three times the object store's size into it: objects are spilled",
        strikes.crowd_object_store,
        "went on",
        restarts={"teacher": 0, "hit": 0, **UNHURT},
        forwards_once=True,
        nodes={"head": Shape({}, num_cpus=2, object_store_bytes=80 << 20)},
    ),
    "disk-full": Fault(
        "no byte left on the disk of the run directory",
        strikes.fill_disk,
        "stopped",
        exit_code=1,
        says=("No space left on device", "krd distill --resume"),
        mend=strikes.free_disk,
        again="resume",
        disk_bytes=DISK_BYTES,
    ),
    "slow-student": Fault(
        f"a student's worker stands still for {strikes.PAUSE_S:.0f} s",
        strikes.stop_for_a_while("student"),
        "went on",
        restarts={"teacher": 0, "hit": 0, **UNHURT},
        forwards_once=True,
    ),
    "slow-teacher": Fault(
        f"the teacher stands still for {strikes.PAUSE_S:.0f} s",
        strikes.stop_for_a_while("teacher"),
        "went on",
        restarts={"teacher": 0, "hit": 0, **UNHURT},
        forwards_once=True,
    ),
    "slow-node": Fault(
        f"all processes of the students' node stand still for {strikes.PAUSE_S:.0f} s",
        strikes.stop_for_a_while("students"),
        "went on",
        forwards_once=True,
        nodes=THREE_NODES,
        changes=ON_THREE_NODES,
        quick=False,
    ),
    "shard-cut": Fault(
        "a shard is cut short before the start",
        strikes.cut_shard,
        "stopped",
        exit_code=1,
        says=("shard train-00000.parquet has", "it was truncated or replaced"),
        before=True,
        mend=strikes.mend_shard,
        again="start",
        own_shards=True,
    ),
    "shard-cut-later": Fault(
        "a shard is cut short while it is streamed",
        strikes.cut_shard,
        "stopped",
        exit_code=1,
        says=("train-00000.parquet, row group", "cannot be read"),
        mend=strikes.mend_shard,
        again="resume",
        own_shards=True,
        changes={"data": {"cache": "stream"}},
    ),
    "nan-loss": Fault(
        f"a student's loss explodes at epoch {EXPLODES_AT}",
        strikes.wait_for_explosion,
        "stopped",
        exit_code=1,
        says=(f"student hit, rank 0: the loss is not finite at epoch {EXPLODES_AT}", "sample ids"),
        equal=("spared",),
        restarts={"teacher": 0, **UNHURT},
        forwards_once=True,
        changes={
            "students": [
                {**each, "train": EXPLODING if each["name"] == "hit" else {}}
                for each in STUDENTS["two students"]
            ]
        },
    ),
}
