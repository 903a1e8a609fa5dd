"""Answers whether a cluster is fit for a run: one table of nodes and checks, and a sentence for all that is not ok.

Does not mend anything; what it writes for the check of shared storage, it removes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from krd_ray.config import RayConfig, RunConfig
from krd_ray.data.manifest import MANIFEST_FILE
from krd_ray.doctor.checks import Finding, Level, judge
from krd_ray.doctor.examiner import versions
from krd_ray.doctor.facts import gather
from krd_ray.errors import ResourceError
from krd_ray.storage.places import absolute, join
from krd_ray.train.cluster import connected, living_nodes
from krd_ray.train.places import check_run

ALL_NODES = "all nodes"
COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def examine(address: str | None, shared: str | None, config: RunConfig | None) -> list[Finding]:
    """Checks a cluster, or this machine.

    Args:
        address: as `ray.address`; None: the config's, and without one a cluster is started here.
        shared: folder or URI that all nodes are to share; None: that check is left out.
        config: of a run that the cluster is to hold; None: those checks are left out.
    Returns:
        What was found, ok included.
    Raises:
        ResourceError: there is no such cluster.
    """
    settings = config.ray if config else RayConfig()
    if address is not None:
        settings = settings.model_copy(update={"address": address})
    data = join(absolute(config.data.dir), MANIFEST_FILE) if config else None
    with connected(settings):
        findings = judge(gather(absolute(shared) if shared else None, data), versions())
        return findings + (_fits(config) if config else [])


def _fits(config: RunConfig) -> list[Finding]:
    """Whether the run finds places: resources, custom ones too, and labels that the config names exist."""
    run = config.expanded()
    try:
        check_run(run, run.students, living_nodes(), streams=config.data.cache == "stream")
    except ResourceError as error:
        said, _, remedy = error.message.partition(". ")
        return [Finding("places", ALL_NODES, "wrong", said, remedy)]
    return [Finding("places", ALL_NODES, "ok")]


def show(findings: Sequence[Finding], console: Console | None = None) -> bool:
    """Prints the table and the sentences; returns whether nothing is wrong."""
    console = console or Console(file=sys.stdout)
    console.print(_table(findings))
    for (level, text, mend), nodes in _alike(findings).items():
        console.print(
            f"{level}: {', '.join(nodes)}: {text}\n  mend: {mend}",
            style=COLOURS[level],
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    counts = {level: sum(finding.level == level for finding in findings) for level in COLOURS}
    console.print(", ".join(f"{number} {level}" for level, number in counts.items()), highlight=False)
    return counts["wrong"] == 0


def _alike(findings: Sequence[Finding]) -> dict[tuple[Level, str, str], list[str]]:
    """All that is not ok, what is worst first; nodes of which the same is to be said share it."""
    said: dict[tuple[Level, str, str], list[str]] = {}
    for level in ("wrong", "warning"):
        for finding in findings:
            if finding.level == level:
                said.setdefault((finding.level, finding.text, finding.mend), []).append(finding.node)
    return said


def _table(findings: Sequence[Finding]) -> Table:
    checks = list(dict.fromkeys(finding.check for finding in findings))
    found = {(finding.node, finding.check): finding.level for finding in findings}
    table = Table("node", *checks)
    for node in dict.fromkeys(finding.node for finding in findings):
        levels = [found.get((node, check)) for check in checks]
        table.add_row(node, *(f"[{COLOURS[level]}]{level}[/]" if level else "" for level in levels))
    return table
