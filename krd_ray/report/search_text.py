"""Answers how a search reads as text: what it looked for, what it found, what it cost; and its table in a terminal.

Does not compute and does not write files.
"""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from krd_ray.report.formats import NO_VALUE, count, percent_with_spread, points, seconds, setting
from krd_ray.report.read_run import Row
from krd_ray.report.read_search import NATS, PARAM, SearchRecord
from krd_ray.report.search_tables import trial_table
from krd_ray.report.verdict import Difference, sentence

COLUMNS = ("val/top1", "val/many", "val/medium", "val/few")
MOST_TRIALS = 10


def objective(search: SearchRecord) -> str:
    """What was searched for, in words."""
    words = {"max": "largest", "min": "smallest"}
    return " and ".join(
        f"{words[mode]} {metric}" for metric, mode in zip(search.metrics, search.modes, strict=True)
    )


def best_line(search: SearchRecord) -> str:
    """The best trial in one sentence; empty while there is none."""
    best = search.record.get("best")
    if not best:
        return ""
    reached = ", ".join(f"{metric} {figure(metric, value)}" for metric, value in best["values"].items())
    if best["baseline"]:
        return f"The config as it stands is best: {reached}."
    front = search.record.get("front") or []
    if len(search.metrics) > 1:
        others = (
            f"{len(front)} trials lie on the front; the one nearest to the best of both is"
            if len(front) > 1
            else "One trial beats all others:"
        )
        return f"{others} trial {best['number']}: {reached}."
    return f"Trial {best['number']} is best: {reached}."


def figure(metric: str, value: float | None) -> str:
    """Write what a trial reached in a metric: a fraction as a percentage, a loss as it is.

    Example:
        >>> figure("val/few", 0.1234), figure("val/loss", 2.30261), figure("val/few", None)
        ('12.3%', '2.3026', '–')
    """
    if value is None:
        return NO_VALUE
    return f"{value:.4f}" if metric in NATS else f"{value:.1%}"


def setting_lines(search: SearchRecord) -> list[tuple[str, str]]:
    """The best trial's settings, name and value."""
    best = search.record.get("best") or {"settings": {}}
    return [(name, setting(value)) for name, value in best["settings"].items()]


def cost_line(search: SearchRecord) -> str:
    """What the search cost and what sharing saved, in one sentence; empty without a ledger."""
    if search.ledger is None or not search.ledger.get("search"):
        return ""
    shared, teacher = search.ledger["search"], search.ledger["teacher"]
    clauses = [f"{seconds(shared['trial_seconds'])} of trials"]
    wall = search.record.get("seconds")
    if wall:
        clauses.append(f"{seconds(sum(wall))} of wall time (sessions that came to their end)")
    if teacher:
        ratio = search.ledger["forwards_per_unique_view"]
        per_view = "" if ratio is None else f" ({ratio:.3f} per unique view)"
        clauses.append(f"{shared['forwards']:,} teacher forwards{per_view}")
        clauses.append(f"{count(shared['forwards_one_teacher_per_trial'])} with one teacher per trial")
    if search.ledger.get("A") is not None:
        clauses.append(
            "CPU time with the teacher inside every trial over this search's: "
            f"A {search.ledger['A']:.2f} of at most A* {search.ledger['A_star']:.2f}"
        )
    return "; ".join(clauses) + "."


def print_search_table(search: SearchRecord, found: list[Difference], console: Console) -> None:
    """Prints the best trials, what they cost, and what the confirmation says."""
    console.print(_table(search))
    for line in (best_line(search), cost_line(search)):
        if line:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found:
        console.print(_confirmation(found))
        console.print("test split, read once; mean and standard deviation over seeds, in %", soft_wrap=True)
    names = [metric.partition("/")[2] for metric in search.metrics]
    for each in found:
        if each.metric in names:
            console.print(sentence(each), soft_wrap=True, highlight=False, markup=False)


def _table(search: SearchRecord) -> Table:
    extra = [metric for metric in search.metrics if metric not in COLUMNS]
    table = Table(box=SIMPLE)
    for name in ("trial", "state", "epochs", *COLUMNS, *extra, "settings"):
        table.add_column(
            name, justify="left" if name in ("trial", "state", "settings") else "right", overflow="fold"
        )
    rows = trial_table(search)
    for row in rows[:MOST_TRIALS]:
        figures = (figure(key, row[key]) for key in (*COLUMNS, *extra))
        table.add_row(str(row["number"]), row["state"], str(row["epochs"]), *figures, _settings(row))
    if len(rows) > MOST_TRIALS:
        table.caption = f"the first {MOST_TRIALS} of {len(rows)}; trials.csv holds all"
    return table


def _settings(row: Row) -> str:
    if row["baseline"]:
        return "the config as it stands"
    drawn = {key.removeprefix(PARAM): value for key, value in row.items() if key.startswith(PARAM)}
    return ", ".join(f"{name}={setting(value)}" for name, value in drawn.items() if value is not None)


def _confirmation(found: list[Difference]) -> Table:
    table = Table(box=SIMPLE)
    for name in ("metric", "baseline", "best", "gain", "seeds"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for each in found:
        table.add_row(
            each.metric,
            percent_with_spread(each.baseline, each.baseline_std),
            percent_with_spread(each.best, each.best_std),
            points(each.gain, each.gain_std),
            str(each.num_pairs),
        )
    return table
