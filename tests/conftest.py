"""Shared test set-up: every test gets the marker of the folder (tier) it lives in."""

from __future__ import annotations

from pathlib import Path

import pytest

TIERS = {"unit": "unit", "ray_tier": "ray", "e2e": "e2e", "gpu": "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        inside = item.path.is_relative_to(root)
        tier = TIERS[item.path.relative_to(root).parts[0]] if inside else "unit"  # doctests of the package
        item.add_marker(getattr(pytest.mark, tier))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests of each tier ran, and how."""
    for tier in TIERS.values():
        counts = {
            outcome: sum(
                tier in getattr(report, "keywords", ()) for report in terminalreporter.getreports(outcome)
            )
            for outcome in ("passed", "failed", "error", "skipped")
        }
        if any(counts.values()):
            shown = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
            terminalreporter.write_line(f"tier {tier}: {shown}")
