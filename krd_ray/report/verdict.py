"""Answers whether a search's best beats the baseline by more than chance: both trained again, with several seeds.

Does not train and does not search. Only test figures of the confirmation run are read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from krd_ray.report.formats import points
from krd_ray.report.read_run import read_run
from krd_ray.report.seeds import mean_and_std
from krd_ray.report.tables import headline_rows

BEST, BASELINE = "best", "baseline"
SHOWN = ("top1", "many", "medium", "few", "balanced", "worst_class", "harmonic_mean", "ece")
LOWER_IS_BETTER = ("ece", "loss")


@dataclass(frozen=True)
class Difference:
    """What the best has over the baseline in one metric, paired by seed.

    Attributes:
        metric: without its split.
        best, best_std, baseline, baseline_std: mean and sample standard deviation over the pairs.
        gain, gain_std: of the differences, with the sign that makes larger better.
        num_pairs: seeds that both were trained and tested with.
    """

    metric: str
    best: float
    best_std: float | None
    baseline: float
    baseline_std: float | None
    gain: float
    gain_std: float | None
    num_pairs: int

    @property
    def is_clear(self) -> bool:
        """True when the mean gain is larger than its own spread and than either one's, over two seeds or more."""
        spreads = (self.gain_std, self.best_std, self.baseline_std)
        return all(spread is not None and self.gain > spread for spread in spreads)


def differences(confirmation: Path) -> list[Difference]:
    """Compares best and baseline on the test split, seed by seed.

    Args:
        confirmation: the run in which both were trained.
    Returns:
        One entry a metric that both know; empty where no pair of seeds has been tested.
    Raises:
        RunError: no run directory.
    """
    run = read_run(confirmation)
    rows = [row for row in headline_rows(run) if row["role"] == "student"]
    method = {entry["name"]: entry.get("method") for entry in run.config["students"]}
    own = {row["seed"]: row for row in rows if method.get(row["name"]) == BEST}
    other = {row["seed"]: row for row in rows if method.get(row["name"]) == BASELINE}
    pairs = [(own[seed], other[seed]) for seed in own if seed in other]
    found = []
    for metric in SHOWN:
        known = [
            (x[metric], y[metric])
            for x, y in pairs
            if x.get(metric) is not None and y.get(metric) is not None
        ]
        if known:
            found.append(_difference(metric, known))
    return found


def _difference(metric: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    """One metric's means, and its differences.

    Example:
        >>> found = _difference("few", [(0.30, 0.20), (0.32, 0.21)])
        >>> round(found.gain, 3), found.is_clear
        (0.105, True)
    """
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best, best_std = mean_and_std([x for x, _ in pairs])
    baseline, baseline_std = mean_and_std([y for _, y in pairs])
    gain, gain_std = mean_and_std([sign * (x - y) for x, y in pairs])
    assert best is not None
    assert baseline is not None
    assert gain is not None
    return Difference(metric, best, best_std, baseline, baseline_std, gain, gain_std, len(pairs))


def sentence(difference: Difference) -> str:
    """Says in words what a difference is worth, whatever it turned out to be."""
    if difference.num_pairs < 2:
        return (
            f"test/{difference.metric}: {points(difference.gain, None)} points for the best, with one seed, which "
            "has no spread: not to be told from chance."
        )
    measured = f"{points(difference.gain, difference.gain_std)} points"
    over = f"over {difference.num_pairs} seeds, paired"
    if difference.is_clear:
        return f"test/{difference.metric}: the best beats the baseline by {measured} {over}: more than the spread."
    if difference.gain > 0:
        return (
            f"test/{difference.metric}: the best is ahead of the baseline by {measured} {over}: not more than the "
            "spread, so no gain is claimed."
        )
    return f"test/{difference.metric}: the best does not beat the baseline: {measured} {over}."
