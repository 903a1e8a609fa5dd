"""The Slurm script starts the head, then the others, then krd, and hands on its exit status and Slurm's SIGTERM.

Slurm is not there: `srun`, `scontrol`, `ray` and `krd` are stand-ins that write down how they were called.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.cluster_rules import CLUSTER

STAND_INS = {
    "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
    "python": "echo 10.0.0.5",
    "srun": """
        for word in "$@"; do case $word in --nodelist=*) export NODE=${word#*=};; --*) ;; *) break;; esac; shift; done
        exec "$@" """,
    "ray": """
        case $1 in
          start) echo "$NODE ray $*" >> calls; touch "up-$NODE"; exec sleep 30;;
          status) for up in up-*; do [ ! -e "$up" ] || echo " 1 node_$up"; done;;
        esac""",
    "krd": """
        trap 'echo "$NODE krd stopped" >> calls; exit 130' TERM
        echo "$NODE krd $*" >> calls
        [ "$2" != slow.yaml ] || for i in $(seq 100); do sleep 0.1; done
        exit 3""",
    "sleep": '[ "$1" != 3 ] || set -- 0.1; exec /bin/sleep "$@"',
}


def submitted(folder: Path, config: str) -> subprocess.Popen[str]:
    (folder / ".venv/bin").mkdir(parents=True)
    for name, body in STAND_INS.items():
        path = folder / ".venv/bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path_of_stand_ins = f"{folder / '.venv/bin'}:{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_ID": "4242"}
    environment = {**os.environ, **slurm, "SLURM_CPUS_PER_TASK": "8", "PATH": path_of_stand_ins}
    return subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sh"), config, "--set", "train.epochs=2"],
        env=environment,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finished(job: subprocess.Popen[str]) -> int:
    """The job's exit status; then, as Slurm does, everything it has started is ended."""
    status = job.wait(timeout=60)
    os.killpg(job.pid, signal.SIGKILL)
    return status


def test_head_comes_first_then_the_others_then_krd_whose_status_is_the_jobs(tmp_path: Path) -> None:
    assert finished(submitted(tmp_path, "config.yaml")) == 3
    head, *others, krd = (tmp_path / "calls").read_text().splitlines()
    assert head.startswith("node1 ray start --head --node-ip-address=10.0.0.5 --port=24242")
    assert sorted(line.split(" --num")[0] for line in others) == [
        "node2 ray start --address=10.0.0.5:24242",
        "node3 ray start --address=10.0.0.5:24242",
    ]
    assert krd == "node1 krd distill config.yaml --set train.epochs=2 --set ray.address=10.0.0.5:24242"


def test_slurms_notice_reaches_krd_which_may_finish_its_checkpoint(tmp_path: Path) -> None:
    job = submitted(tmp_path, "slow.yaml")
    calls = tmp_path / "calls"
    until = time.monotonic() + 60
    while not (calls.exists() and "krd" in calls.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert finished(job) == 130
    assert calls.read_text().endswith("node1 krd stopped\n")


@pytest.mark.parametrize("given", [{}, {"SLURM_SUBMIT_DIR": "."}])
def test_script_without_slurm_or_without_config_says_how_to_call_it(given: dict[str, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh")],
        env=environment | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "sbatch" in done.stderr
