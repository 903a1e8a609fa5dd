"""Answers what is wrong with a cluster, by the facts of its nodes, and which command mends it.

Does not ask nodes and does not print: each check is a pure function of one node's facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from krd_ray.doctor.facts import NodeFacts

Level = Literal["ok", "warning", "wrong"]
MIB, GIB = 1 << 20, 1 << 30
CLOCK_WARNING_S, CLOCK_WRONG_S = 1.0, 10.0
DISK_WARNING_BYTES, DISK_WRONG_BYTES = 10 * GIB, GIB
DISK_WRONG_FRAC = 0.05  # Ray makes no objects on a disk that is 95 % full
LOOPBACK = ("127.", "localhost", "[::1]")
STORE_WRONG_BYTES = 128 * MIB
STORE_WARNING_FRAC = 0.1


@dataclass(frozen=True)
class Finding:
    """One check of one node: what was found, and what mends it where something is to mend."""

    check: str
    node: str
    level: Level
    text: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Verdict:
    """A finding before it has a check's and a node's name."""

    level: Level = "ok"
    text: str = ""
    mend: str = ""


OK = Verdict()


def judge(facts: Sequence[NodeFacts], here: Mapping[str, str]) -> list[Finding]:
    """Returns every check of every node; a node that did not answer has one finding only.

    Args:
        facts: of all nodes.
        here: versions where the command runs; nodes must have the same.
    """
    findings = []
    for node in facts:
        if node.error:
            findings.append(
                Finding(
                    "answers",
                    node.name,
                    "wrong",
                    f"it does not answer: {node.error}",
                    "`ray status`, and on the node `tail /tmp/ray/session_latest/logs/raylet.err`",
                )
            )
            continue
        found = {"versions": versions(node, here), **{name: check(node) for name, check in CHECKS.items()}}
        if len(facts) == 1 and node.cannot_write is None:
            del found["shared"]
        if node.cannot_read_data is None:
            del found["data"]
        findings += [Finding(check, node.name, v.level, v.text, v.mend) for check, v in found.items()]
    return findings


def versions(node: NodeFacts, here: Mapping[str, str]) -> Verdict:
    """Python and packages are the same as here."""
    other = {name: version for name, version in here.items() if node.versions.get(name) != version}
    if not other:
        return OK
    text = ", ".join(
        f"{name} {node.versions.get(name, 'none')} (here {version})" for name, version in other.items()
    )
    wanted = " ".join(
        f"{name}=={version}" for name, version in other.items() if name not in ("python", "krd_ray")
    )
    steps = [f"`pip install {wanted}`"] if wanted else []
    steps += (
        ["install the same krd_ray (`pip install -e .` in the same checkout)"] if "krd_ray" in other else []
    )
    steps += [f"make its environment with Python {here['python']}"] if "python" in other else []
    return Verdict(
        "wrong", f"other versions: {text}", f"on that node {', '.join(steps)}; then restart Ray there"
    )


def gpus(node: NodeFacts) -> Verdict:
    """Ray hands out the GPUs that torch sees, no more and no fewer."""
    if node.ray_gpus > node.torch_gpus:
        why = "" if node.torch_cuda else "; this torch is built without CUDA"
        return Verdict(
            "wrong",
            f"Ray promises {node.ray_gpus:g} GPU, torch sees {node.torch_gpus}{why}",
            f"`nvidia-smi` there; then a CUDA build of torch, or Ray started with --num-gpus={node.torch_gpus}",
        )
    if node.torch_gpus > node.ray_gpus:
        return Verdict(
            "warning",
            f"torch sees {node.torch_gpus} GPU, Ray hands out {node.ray_gpus:g}",
            f"start Ray there with --num-gpus={node.torch_gpus}",
        )
    return OK


def clock(node: NodeFacts) -> Verdict:
    """Clocks agree: times of rows are compared between nodes, and object stores refuse requests from the past."""
    surely_off_s = abs(node.clock_offset_s) - node.clock_bound_s
    if surely_off_s <= CLOCK_WARNING_S:
        return OK
    way = "ahead of" if node.clock_offset_s > 0 else "behind"
    text = f"its clock is {abs(node.clock_offset_s):.1f} s (+- {node.clock_bound_s:.3f} s) {way} this one"
    level: Level = "wrong" if surely_off_s > CLOCK_WRONG_S else "warning"
    return Verdict(level, text, "on both `sudo timedatectl set-ntp true`, or `sudo chronyc makestep`")


def disk(node: NodeFacts) -> Verdict:
    """There is room where Ray spills objects."""
    free, total = node.disk_free_bytes, node.disk_total_bytes
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free in {node.disk_path}, where Ray spills objects"
    mend = "remove old sessions there, or start Ray with --temp-dir on a larger disk"
    if free < DISK_WRONG_BYTES or free < DISK_WRONG_FRAC * total:
        return Verdict("wrong", text, mend)
    return Verdict("warning", text, mend) if free < DISK_WARNING_BYTES else OK


def object_store(node: NodeFacts) -> Verdict:
    """The object store, which decoded shards live in, is a fair share of the memory and lies in memory."""
    size, memory = node.object_store_bytes, node.memory_bytes
    share = f"the object store has {size / MIB:,.0f} MiB of {memory / MIB:,.0f} MiB of memory"
    mend = f"start Ray there with --object-store-memory={int(0.3 * memory)}"
    if size < STORE_WRONG_BYTES:
        return Verdict("wrong", f"{share}: decoded shards and batches have no room", mend)
    shm = node.shared_memory_bytes
    if shm is not None and shm < size:
        return Verdict(
            "warning",
            f"/dev/shm has {shm / MIB:,.0f} MiB, the object store {size / MIB:,.0f} MiB: the rest lies on disk",
            f"`sudo mount -o remount,size={int(size)} /dev/shm` (containers: --shm-size), or a smaller store",
        )
    return (
        Verdict("warning", f"{share}: shards are read again each epoch", mend)
        if size < STORE_WARNING_FRAC * memory
        else OK
    )


def ports(node: NodeFacts) -> Verdict:
    """Whoever reaches Ray's ports can run code: they listen on loopback, or ask for a token."""
    text = ", ".join(f"{name} on {_few(ports)}" for name, ports in sorted(node.open_ports.items()))
    if node.open_ports and not node.has_token:
        return Verdict(
            "wrong",
            f"token authentication is off, and ports are open to other machines: {text}",
            "`ray get-auth-token --generate`, that token on every node, then restart Ray with RAY_AUTH_MODE=token",
        )
    if node.dashboard and not node.dashboard.startswith(LOOPBACK):
        return Verdict(
            "warning",
            f"the dashboard listens beyond loopback, on {node.dashboard}",
            "start the head with --dashboard-host=127.0.0.1 and look at it through `ssh -L 8265:127.0.0.1:8265`",
        )
    return OK


def shared(node: NodeFacts) -> Verdict:
    """Every node writes into the shared folder and reads what the others wrote."""
    mend = "mount the same storage at the same path on every node, writable for the user that runs Ray"
    if node.cannot_write is None:
        return Verdict(
            "warning", "whether nodes share a folder was not checked", "`krd doctor --shared PATH`"
        )
    if node.cannot_write:
        return Verdict("wrong", f"it cannot write and remove a file there: {node.cannot_write}", mend)
    if node.cannot_read:
        writer, why = next(iter(node.cannot_read.items()))
        return Verdict("wrong", f"it cannot read what {writer} wrote: {why}", mend)
    return OK


def data(node: NodeFacts) -> Verdict:
    """The run's shards are seen from the node."""
    if node.cannot_read_data:
        return Verdict(
            "wrong",
            f"the config's shards are not there: {node.cannot_read_data}",
            "set data.dir to a folder that all nodes see, or copy the shards to the same path",
        )
    return OK


def _few(ports: Sequence[int]) -> str:
    more = f" and {len(ports) - 3} more" if len(ports) > 3 else ""
    return ", ".join(map(str, ports[:3])) + more


CHECKS: dict[str, Callable[[NodeFacts], Verdict]] = {
    "GPUs": gpus,
    "clock": clock,
    "disk": disk,
    "object store": object_store,
    "ports": ports,
    "shared": shared,
    "data": data,
}
