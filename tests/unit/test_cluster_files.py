"""Every file of cluster/ is accepted, installs the lock, asks for the token and opens nothing; broken copies fail."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from krd_ray.config import RunConfig
from krd_ray.config_io import load_config
from tests.unit.cluster_rules import (
    CLUSTER,
    ROOT,
    launcher_complaints,
    manifest_complaints,
    prepared,
    script_complaints,
)

LAUNCHERS = ("aws", "aws-smoke", "azure", "gcp", "on_prem")
CLOUDS = ("aws", "azure", "gcp")
MANIFESTS = ("raycluster", "rayjob")
SCRIPTS = ("local_hosts.sh", "slurm.sh")


def launcher(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return loaded


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def test_every_file_of_the_folder_is_tested_here() -> None:
    named = {f"{name}.yaml" for name in (*LAUNCHERS, *MANIFESTS, "smoke")} | {
        *SCRIPTS,
        "Dockerfile",
        "README.md",
    }
    assert {path.name for path in CLUSTER.iterdir()} == named


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_file_is_accepted_by_ray_and_keeps_the_rules(name: str) -> None:
    assert launcher_complaints(launcher(name)) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_has_only_known_fields_and_keeps_the_rules(name: str) -> None:
    assert manifest_complaints(manifests(name)) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_bash_and_shellcheck_finds_nothing(name: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", str(CLUSTER / name)], capture_output=True, text=True, check=False
        )
        assert found.stdout == ""


def test_slurm_script_keeps_the_rules() -> None:
    assert script_complaints((CLUSTER / "slurm.sh").read_text()) == []


@pytest.mark.parametrize("name", CLOUDS)
def test_teacher_student_and_head_are_where_the_readme_says(name: str) -> None:
    nodes = prepared(launcher(name))["available_node_types"]
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert nodes["teacher"]["resources"].keys() == {"CPU", "GPU", "teacher"}
    assert nodes["student"]["resources"].keys() == {"CPU", "GPU"}
    assert 0 < nodes["student"]["min_workers"] < nodes["student"]["max_workers"]


def smoke() -> RunConfig:
    return load_config(CLUSTER / "smoke.yaml")


def test_what_the_smoke_run_asks_for_stands_on_the_nodes_of_aws_smoke() -> None:
    nodes = prepared(launcher("aws-smoke"))["available_node_types"]
    have: dict[str, float] = {}
    for node in nodes.values():
        for resource, amount in node["resources"].items():
            have[resource] = have.get(resource, 0) + amount * max(1, node["max_workers"])
    config = smoke()
    assert config.teacher is not None
    wanted = dict(config.teacher.resources.as_ray())
    for student in config.students:
        for resource, amount in student.resources.as_ray().items():
            wanted[resource] = wanted.get(resource, 0) + amount * student.workers
    assert all(wanted[resource] <= have.get(resource, 0) for resource in wanted), (wanted, have)
    assert sum(student.workers for student in config.students) == 3, "one process for each node"


def test_the_job_of_the_manifest_is_a_command_that_krd_takes() -> None:
    words = shlex.split(manifests("rayjob")[0]["spec"]["entrypoint"])
    assert words[:2] == ["krd", "distill"]
    config = load_config(ROOT / Path(words[2]).relative_to("/krd"), words[4::2])
    assert set(words[3::2]) == {"--set"}
    assert config.teacher is not None
    assert config.teacher.resources.custom == {"teacher": 1}


def test_the_image_holds_what_the_manifests_use() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert "pip install --no-cache-dir --requirement requirements.lock" in text
    assert re.search(r"^FROM python:3\.11-\S+$", text, re.MULTILINE)
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    assert {"configs", "krd_ray", "requirements.lock"} <= set(copied)


def student(config: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = config["available_node_types"]["student"]
    return node


def replaced(part: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        before = list(config[part])
        config[part] = [command.replace(old, new) for command in before]
        assert config[part] != before, "the mutation must change something"

    return change


def opened(config: dict[str, Any]) -> None:
    ssh = {"IpProtocol": "tcp", "FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    config["provider"]["security_group"] = {"GroupName": "krd", "IpPermissions": [ssh]}


BROKEN_LAUNCHERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("aws", lambda c: c.update(max_wrokers=3), "Ray refuses it"),
    ("aws", lambda c: c["provider"].pop("type"), "Ray refuses it"),
    ("gcp", lambda c: student(c)["resources"].update(GPU=0.5), "Ray refuses it"),
    ("on_prem", lambda c: c["provider"].pop("head_ip"), "Ray refuses it"),
    ("aws", lambda c: c.update(max_workers=1), "Ray refuses it"),
    ("aws", lambda c: c.update(max_workers=3), "the node types may have 5"),
    ("azure", lambda c: student(c).update(max_workers=0), "min_workers is above max_workers"),
    ("aws", replaced("setup_commands", "--requirement ~/krd/requirements.lock", "ray"), "does not install"),
    ("gcp", lambda c: c["file_mounts"].pop("~/krd/requirements.lock"), "requirements.lock is not mounted"),
    ("gcp", lambda c: c["file_mounts"].update({"~/krd/x": "no/such"}), "no/such does not exist"),
    ("azure", lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "the token is not mounted"),
    ("on_prem", replaced("worker_start_ray_commands", "RAY_AUTH_MODE=token", ""), "without RAY_AUTH_MODE"),
    ("aws", replaced("head_start_ray_commands", "RAY_AUTH_MODE=token", ""), "without RAY_AUTH_MODE"),
    ("gcp", replaced("head_start_ray_commands", "127.0.0.1", "0.0.0.0"), "0.0.0.0 stands in it"),
    (
        "on_prem",
        replaced("head_start_ray_commands", "--dashboard-host=127.0.0.1", ""),
        "not bound to loopback",
    ),
    ("azure", lambda c: c.pop("head_start_ray_commands"), "0.0.0.0 stands in it"),
    ("aws", opened, "0.0.0.0 stands in it"),
    ("aws", lambda c: student(c)["node_config"].pop("SecurityGroupIds"), "open to the world on port 22"),
    ("gcp", lambda c: student(c)["node_config"].pop("networkInterfaces"), "stands in the default network"),
    ("aws", lambda c: c["available_node_types"]["teacher"]["resources"].pop("teacher"), "no node carries"),
    ("on_prem", replaced("head_start_ray_commands", "teacher", "techer"), "no node carries"),
    ("aws", lambda c: student(c)["resources"].update(studnet=1), "no config asks for the resource `studnet`"),
    ("aws", lambda c: student(c)["node_config"].pop("InstanceMarketOptions"), "students belong on spot"),
    ("gcp", lambda c: student(c)["node_config"].pop("scheduling"), "students belong on spot"),
    (
        "azure",
        lambda c: c["available_node_types"]["head"]["node_config"]["azure_arm_parameters"].update(
            priority="Spot"
        ),
        "the head and the teacher must stay",
    ),
    ("aws-smoke", lambda c: c.pop("worker_setup_commands"), "would not be the same folder"),
    ("gcp", replaced("head_setup_commands", "exportfs", "true"), "would not be the same folder"),
    ("azure", lambda c: c["provider"].pop("cache_stopped_nodes"), "disks go on costing"),
]


@pytest.mark.parametrize(("name", "change", "complaint"), BROKEN_LAUNCHERS)
def test_broken_copy_of_a_launcher_file_is_found(
    name: str, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    broken = copy.deepcopy(launcher(name))
    change(broken)
    assert any(complaint in found for found in launcher_complaints(broken)), launcher_complaints(broken)


def pod_of(spec: dict[str, Any], group: int) -> dict[str, Any]:
    pod: dict[str, Any] = spec["workerGroupSpecs"][group]["template"]["spec"]
    return pod


BROKEN_MANIFESTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s.pop("authOptions"), "'authOptions' is a required property"),
    (lambda s: s["authOptions"].update(mode="disabled"), "'token' was expected"),
    (lambda s: s["headGroupSpec"].update(serviceType="LoadBalancer"), "'ClusterIP' was expected"),
    (lambda s: s["headGroupSpec"].update(enableIngress=True), "enableIngress"),
    (lambda s: s["workerGroupSpecs"][1].update(minReplica=2), "minReplica"),
    (lambda s: s["workerGroupSpecs"][1].update(minReplicas=2), "do not lie between"),
    (lambda s: s["workerGroupSpecs"][0].update(rayStartParams={}), "belongs to the teacher group"),
    (lambda s: pod_of(s, 1).update(hostNetwork=True), "hostNetwork"),
    (lambda s: pod_of(s, 1).pop("securityContext"), "'securityContext' is a required property"),
    (lambda s: pod_of(s, 0)["containers"][0].update(image="krd:latest"), "krd:latest is not pinned"),
    (lambda s: pod_of(s, 0)["containers"][0].update(image="localhost:5000/krd"), "is not pinned"),
    (lambda s: pod_of(s, 0)["containers"][0]["resources"]["limits"].update(cpu="60"), "limits differ"),
    (lambda s: pod_of(s, 0)["volumes"].pop(0), "no volume is called data"),
    (lambda s: s.update(rayVersion="2.9.0"), "not that of requirements.lock"),
]


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(("change", "complaint"), BROKEN_MANIFESTS)
def test_broken_copy_of_a_manifest_is_found(
    name: str, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    broken = manifests(name)
    spec = broken[0]["spec"]
    change(spec["rayClusterSpec"] if name == "rayjob" else spec)
    assert any(complaint in found for found in manifest_complaints(broken)), manifest_complaints(broken)


def test_manifest_with_a_public_service_or_an_open_policy_is_found() -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "krd"},
        "spec": {"type": "NodePort"},
    }
    assert manifest_complaints([service]) == ["kind Service is not expected here"]
    policy = manifests("raycluster")[1]
    policy["spec"]["ingress"][0]["from"].append({"ipBlock": {"cidr": "0.0.0.0/0"}})
    assert any("ipBlock" in found for found in manifest_complaints([policy]))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "without RAY_AUTH_MODE"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "not bound to loopback"),
        ('{"teacher": 1}', '{"techer": 1}', "no node carries"),
        ("set -euo pipefail", "set -u", "goes on after an error"),
        ("ray start --address", "ray strat --address", "one head and the others"),
    ],
)
def test_broken_copy_of_the_slurm_script_is_found(old: str, new: str, complaint: str) -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    assert old in text
    assert any(complaint in found for found in script_complaints(text.replace(old, new)))


def test_bash_refuses_a_broken_script(tmp_path: Path) -> None:
    path = tmp_path / "slurm.sh"
    path.write_text((CLUSTER / "slurm.sh").read_text().replace("done\n", "\n", 1))
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode != 0
