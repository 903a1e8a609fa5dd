"""Answers what the end of a run prints: the report's headline table, in a terminal.

Does not compute: `tables` and `comparison` do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from krd_ray.report.comparison import Comparison, compare
from krd_ray.report.comparison_text import print_comparison
from krd_ray.report.read_run import Run, read_run
from krd_ray.report.seeds import compares
from krd_ray.report.sharing import losses, memory_sentence
from krd_ray.report.tables import headline_rows, seeds

COLUMNS = {
    "top1": "top-1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "ece": "ECE",
}
TEXT_COLUMNS = ("model", "loss", "state")
WIDTH_WHEN_PIPED = 124


def print_headline(run_dir: Path) -> None:
    """Prints one row a model, or a method where a run compares them; then what sharing the teacher saved."""
    run = read_run(run_dir)
    console = new_console()
    if compares(run):
        print_comparison(compare([run]), console)
    else:
        console.print(_students_table(run))
        console.print(_split_line(run))
    if run.ledger and run.ledger["teacher"]:
        console.print(_ledger_line(run.ledger), soft_wrap=True)


def print_methods(comparison: Comparison) -> None:
    """Prints one row a data set, method and model."""
    print_comparison(comparison, new_console())


def new_console() -> Console:
    """A console on standard output, of fixed width where that is no terminal."""
    piped = not sys.stdout.isatty()
    return Console(file=sys.stdout, width=WIDTH_WHEN_PIPED if piped else None, highlight=False)


def _students_table(run: Run) -> Table:
    table = Table(box=SIMPLE)
    for name in ("model", "loss", "params", *COLUMNS.values(), "images/s", "waiting", "state"):
        side: Literal["left", "right"] = "left" if name in TEXT_COLUMNS else "right"
        table.add_column(name, overflow="fold", no_wrap=name != "loss", justify=side)
    for row in headline_rows(run):
        table.add_row(
            row["name"],
            row["loss_name"] or "-",
            _number(row["num_params"]),
            *(_percent(row[key]) for key in COLUMNS),
            _number(row["images_per_s"]),
            _percent(row["wait_frac"]),
            row["status"],
        )
    return table


def _split_line(run: Run) -> str:
    """Which split the accuracies are of, and how many seeds stand behind a row and behind the table."""
    if run.evaluation is None:
        return "not evaluated on a test split"
    trained = seeds(run)
    each = "one seed" if len(trained) == 1 else f"one seed per student (of {', '.join(map(str, trained))})"
    return f"accuracy on the {run.evaluation['split']} split, {each}"


def _ledger_line(ledger: dict[str, Any]) -> str:
    """What the teacher did, what passed through the driver, what sharing saved of what it could, who holds memory."""
    driver, teacher, ratio = ledger["driver_bytes"], ledger["teacher"], ledger["forwards_per_unique_view"]
    clauses = [
        f"forwards_per_unique_view: {'-' if ratio is None else f'{ratio:.3f}'} "
        f"({teacher['forwards']:,} forwards, {_served(ledger)}{teacher['restarts']} teacher restart(s))",
        f"driver bytes: pixels {driver['pixels']}, targets {driver['targets']}",
        _gain(ledger),
        memory_sentence(ledger),
    ]
    return "; ".join(clause for clause in clauses if clause)


def _served(ledger: dict[str, Any]) -> str:
    """How many targets; with the teacher off nobody counts what students read from the store."""
    if not ledger["teacher"]["replicas"]:
        return "all targets read from the store, "
    return f"{ledger['teacher']['rows']:,} targets served, "


def _gain(ledger: dict[str, Any]) -> str:
    if ledger["A"] is None:
        return ""
    gain = f"A {ledger['A']:.2f} of at most A* {ledger['A_star']:.2f}, eta {ledger['eta']:.2f}"
    where, share = next(iter(losses(ledger)), ("", 0.0))
    return f"{gain} (lost most to {where}: {share:.2f})" if share >= 0.005 else gain


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
