"""Answers what is wrong with a file of cluster/: a list of complaints, empty for a good one.

Does not launch anything. Ray's own validator says whether the launcher would read the file; the rules here say
whether it installs the lock, asks for the token, opens nothing to the world and brings nodes the configs can use.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema

from tests.unit.kuberay_schema import SCHEMAS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
TOKEN = "~/.ray/auth_token"
LOCK = "--requirement ~/krd/requirements.lock"
PINNED = re.compile(r"^[^:@]+(:\d[\w.-]*|@sha256:[0-9a-f]{64})$")


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a launcher's file as `ray up` reads it, with Ray's defaults filled in.

    Raises:
        ValidationError, ClickException, ValueError, KeyError: Ray refuses it, in one of its ways.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config  # private; no other way offline

    filled: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def launcher_complaints(config: dict[str, Any]) -> list[str]:
    """Complaints about a file for `ray up`."""
    try:
        filled = prepared(config)
    except (jsonschema.ValidationError, click.ClickException, ValueError, KeyError) as error:
        return [f"Ray refuses it: {str(error).splitlines()[0]}"]
    rules = (_workers, _lock, _token, _world, _teacher, _cost, _storage)
    return [complaint for rule in rules for complaint in rule(filled)]


def _types(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for name, node in config["available_node_types"].items():
        yield name, node, name == config["head_node_type"]


def _workers(config: dict[str, Any]) -> Iterator[str]:
    most = 0
    for name, node, _ in _types(config):
        if node["min_workers"] > node["max_workers"]:
            yield f"{name}: min_workers is above max_workers"
        most += node["max_workers"]
    if config["max_workers"] < most:
        yield f"max_workers is {config['max_workers']}, the node types may have {most}"


def _lock(config: dict[str, Any]) -> Iterator[str]:
    for part in ("head_setup_commands", "worker_setup_commands"):
        if not any(LOCK in command for command in config[part]):
            yield f"{part} does not install requirements.lock"
    for remote, local in config["file_mounts"].items():
        if remote != TOKEN and not (ROOT / local).exists():
            yield f"file_mounts: {local} does not exist"
    if config["file_mounts"].get("~/krd/requirements.lock") != "requirements.lock":
        yield "file_mounts: requirements.lock is not mounted"


def _token(config: dict[str, Any]) -> Iterator[str]:
    if config["file_mounts"].get(TOKEN) != TOKEN:
        yield "file_mounts: the token is not mounted"
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[part]:
            before, found, _ = command.partition("ray start")
            if found and "RAY_AUTH_MODE=token" not in before:
                yield f"{part}: `ray start` without RAY_AUTH_MODE=token"


def _world(config: dict[str, Any]) -> Iterator[str]:
    text = json.dumps(config)
    for everywhere in ("0.0.0.0", "::/0"):
        if everywhere in text:
            yield f"{everywhere} stands in it"
    if not any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"]):
        yield "the dashboard is not bound to loopback"
    kind = config["provider"]["type"]
    for name, node, _ in _types(config):
        settings = node["node_config"]
        if kind == "aws" and not settings.get("SecurityGroupIds"):
            yield f"{name}: without SecurityGroupIds Ray makes a group that is open to the world on port 22"
        if kind == "gcp" and not all(
            "subnetworks/" in interface.get("subnetwork", "")
            and not interface["subnetwork"].endswith("/default")
            for interface in settings.get("networkInterfaces", [{}])
        ):
            yield f"{name}: it stands in the default network, which is open to the world on ports 22 and 3389"


def _teacher(config: dict[str, Any]) -> Iterator[str]:
    declared = {name for _, node, _ in _types(config) for name in node["resources"]}
    declared |= set(re.findall(r'--resources=\'{"(\w+)"', " ".join(config["head_start_ray_commands"])))
    if "teacher" not in declared:
        yield "no node carries the resource `teacher`"
    for name in declared - {"teacher", "CPU", "GPU"}:
        yield f"no config asks for the resource `{name}`"


def _cost(config: dict[str, Any]) -> Iterator[str]:
    kind = config["provider"]["type"]
    if kind == "local":
        return
    if config["provider"].get("cache_stopped_nodes") is not False:
        yield "`ray down` would only stop the machines, whose disks go on costing"
    for name, node, is_head in _types(config):
        spot = _is_spot(kind, node["node_config"])
        if spot and (is_head or "teacher" in node["resources"]):
            yield f"{name}: on spot, but the head and the teacher must stay"
        if not spot and not is_head and "teacher" not in node["resources"]:
            yield f"{name}: students belong on spot"


def _storage(config: dict[str, Any]) -> Iterator[str]:
    if config["provider"]["type"] != "local":
        for part, way in (("head_setup_commands", "exportfs"), ("worker_setup_commands", "mount -t nfs")):
            if not any(way in command and "/mnt/krd" in command for command in config[part]):
                yield f"{part}: /mnt/krd would not be the same folder on all nodes"


def _is_spot(kind: str, settings: dict[str, Any]) -> bool:
    if kind == "aws":
        return bool(settings.get("InstanceMarketOptions", {}).get("MarketType") == "spot")
    if kind == "gcp":
        return bool(settings.get("scheduling", {}).get("provisioningModel") == "SPOT")
    return bool(settings["azure_arm_parameters"].get("priority") == "Spot")


def manifest_complaints(documents: list[dict[str, Any]]) -> list[str]:
    """Complaints about a file for `kubectl apply`."""
    found = []
    for document in documents:
        kind = document.get("kind", "nothing")
        if kind not in SCHEMAS:
            found.append(f"kind {kind} is not expected here")
            continue
        validator = jsonschema.Draft202012Validator(SCHEMAS[kind])
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
        found += errors
        if not errors and kind in ("RayCluster", "RayJob"):
            spec = document["spec"]
            found += list(_kuberay(spec["rayClusterSpec"] if kind == "RayJob" else spec))
    return found


def _kuberay(cluster: dict[str, Any]) -> Iterator[str]:
    locked = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    if locked is None or cluster["rayVersion"] != locked[1]:
        yield f"rayVersion {cluster['rayVersion']} is not that of requirements.lock"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, group in groups.items():
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: replicas do not lie between minReplicas and maxReplicas"
        resources = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        if (name == "teacher") != (resources == {"teacher": 1}):
            yield f"{name}: the resource `teacher` belongs to the teacher group, and to no other"
    for group in (cluster["headGroupSpec"], *groups.values()):
        yield from _pod(group["template"]["spec"])


def _pod(spec: dict[str, Any]) -> Iterator[str]:
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        name = container["name"]
        if not PINNED.match(container["image"]):
            yield f"{name}: image {container['image']} is not pinned"
        if container["resources"]["requests"] != container["resources"]["limits"]:
            yield f"{name}: requests and limits differ, so Ray counts what the pod does not have"
        for mount in container["volumeMounts"]:
            if mount["name"] not in volumes:
                yield f"{name}: no volume is called {mount['name']}"


def script_complaints(text: str) -> list[str]:
    """Complaints about the Slurm script, besides what `bash -n` and shellcheck say."""
    starts = [line for line in text.replace("\\\n", "").splitlines() if "ray start" in line]
    found = []
    if len(starts) != 2:
        found.append("it does not start one head and the others")
    if "RAY_AUTH_MODE=token" not in text.partition("ray start")[0]:
        found.append("`ray start` without RAY_AUTH_MODE=token")
    for line in starts:
        words = shlex.split(line.replace("&", ""), comments=True)
        if "--head" in words and "--dashboard-host=127.0.0.1" not in words:
            found.append("the dashboard is not bound to loopback")
        if "--head" in words and '--resources={"teacher": 1}' not in words:
            found.append("no node carries the resource `teacher`")
    if "set -euo pipefail" not in text:
        found.append("it goes on after an error")
    return found
