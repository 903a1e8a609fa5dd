"""Answers how a comparison reads as text: one table for Markdown, terminal and page, and the sentences below it.

Does not compute (`comparison` does) and does not write files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from krd_ray.report.comparison import DIFFERENCES, METRICS, Comparison, clear_best
from krd_ray.report.formats import count, milliseconds, percent_with_spread, points
from krd_ray.report.read_run import Row, Run

HEADINGS = {
    "top1": "top-1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced": "balanced",
    "ece": "ECE",
    "agreement": "as teacher",
}
DASH = "-"
WIDEST = Console(width=1000).options
WORDS = ("data", "model", "method", "state")


@dataclass(frozen=True)
class Cell:
    """One cell of a table as text; `bold` where it leads."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class TextTable:
    """A table as text: headings, rows of as many cells, and the row of numbers behind each."""

    headings: list[str]
    rows: list[list[Cell]]
    sources: list[Row]

    @property
    def words(self) -> tuple[str, ...]:
        """Headings of the columns that hold words and stand left."""
        return WORDS


def comparison_table(comparison: Comparison, *, costs: bool) -> TextTable:
    """Put the cells of a comparison into words, mean ± spread in percent.

    Columns that say nothing are left out: the data set where there is one, the model where there is one, balanced
    accuracy where it is the same as top-1 (a balanced split), agreement where none was counted, the state where
    every student was evaluated.

    Args:
        comparison: what to show.
        costs: with parameters and latency.
    Returns:
        The table; `-` where a number is not known.
    """
    cells, best = comparison.cells, clear_best(comparison.cells)
    columns = _columns(comparison, costs)
    rows = []
    for cell in cells:
        where = (cell["dataset"], cell["model"])
        rows.append(
            [Cell(_text(cell, column), best.get((*where, column)) is cell) for column in columns.values()]
        )
    return TextTable(list(columns), rows, cells)


def _columns(comparison: Comparison, costs: bool) -> dict[str, str]:
    """Heading -> key of the cells."""
    cells = comparison.cells
    students = [cell for cell in cells if cell["role"] == "student"]
    balanced = all(cell["balanced"] is None or _same(cell["balanced"], cell["top1"]) for cell in cells)
    columns = {"data": "dataset"} if len({cell["dataset"] for cell in cells}) > 1 else {}
    if len({cell["model"] for cell in students}) > 1:
        columns["model"] = "model"
    columns |= {"method": "method", "seeds": "num_seeds"}
    if costs:
        known = {key for key in ("num_params", "latency_ms") if any(cell[key] is not None for cell in cells)}
        columns |= {"params": "num_params"} if "num_params" in known else {}
        columns |= {"CPU ms": "latency_ms"} if "latency_ms" in known else {}
    left_out = {"balanced"} if balanced else set()
    left_out |= set() if any(cell["agreement"] is not None for cell in cells) else {"agreement"}
    columns |= {HEADINGS[key]: key for key in METRICS if key not in left_out}
    return columns | ({"state": "state"} if any(cell["state"] for cell in cells) else {})


def _text(cell: Row, key: str) -> str:
    value = cell[key]
    if key == "method":
        return "teacher" if cell["role"] == "teacher" else value or "loss not known"
    if value is None:
        return DASH
    if key in METRICS:
        return percent_with_spread(value, cell[f"{key}_std"])
    if key == "latency_ms":
        return milliseconds(value)
    return count(value) if key in ("num_params", "num_seeds") else str(value)


def _same(first: float, second: float | None) -> bool:
    return second is not None and abs(first - second) < 1e-9


def paired_table(comparison: Comparison) -> TextTable | None:
    """The differences to one method, in percentage points; None where none were asked for."""
    if comparison.against is None:
        return None
    cells = [cell for cell in comparison.cells if cell["num_pairs"] is not None]
    shown = _columns(comparison, costs=False)
    columns = {heading: key for heading, key in shown.items() if heading in ("data", "model", "method")}
    rows = []
    for cell in cells:
        words = [*(_text(cell, key) for key in columns.values()), str(cell["num_pairs"])]
        differences = [
            DASH if cell[f"{key}_diff"] is None else points(cell[f"{key}_diff"], cell[f"{key}_diff_std"])
            for key in DIFFERENCES
        ]
        rows.append([Cell(text) for text in (*words, *differences)])
    return TextTable([*columns, "pairs", *(HEADINGS[key] for key in DIFFERENCES)], rows, cells)


def models_table(comparison: Comparison) -> TextTable:
    """What each model costs; a model on data of another kind costs something else and has its own row."""
    first: dict[tuple[Any, ...], Row] = {}
    for cell in comparison.cells:
        first.setdefault((cell["model"], cell["num_params"]), cell)
    cells = sorted(first.values(), key=lambda cell: (cell["num_params"] or float("inf"), str(cell["model"])))
    rows = [
        [
            Cell(str(cell["model"] or DASH)),
            *(Cell(count(cell[key]) if cell[key] else DASH) for key in ("num_params", "num_flops")),
            Cell(milliseconds(cell["latency_ms"]) if cell["latency_ms"] else DASH),
        ]
        for cell in cells
        if cell["num_params"] is not None
    ]
    return TextTable(["model", "params", "FLOPs", "CPU ms"], rows, cells)


def notes(comparison: Comparison) -> list[str]:
    """The sentences without which the table could be misread."""
    if not any(row["evaluated"] for row in comparison.students):
        return [f"No student is evaluated on the {comparison.split} split."]
    split = f"{comparison.split} split{_num_images(comparison)}"
    spreads = any(cell["top1_std"] is not None for cell in comparison.cells)
    said = [f"Accuracies in % on the {split}, {seeds_in_words(comparison)}."]
    if spreads:
        said.append(
            "Bold: better than every other method of the model by more than both standard deviations; "
            "where no method leads so, none is bold."
        )
    else:
        said.append("One seed has no spread: small differences may be chance, and none is called best.")
    if any(cell["ece"] is not None for cell in comparison.cells):
        said.append("ECE in %, lower is better.")
    if any(cell["agreement"] is not None for cell in comparison.cells):
        said.append("As teacher: share of images with the teacher's top class.")
    if any(f"({row['name']})" in str(row["method"]) for row in comparison.students):
        said.append(
            "Students of one method and model that share a seed, or differ in settings, stand apart under their "
            "own names; give each a `method`."
        )
    return said


def paired_note(comparison: Comparison) -> str:
    """What the table of differences shows."""
    return (
        f"Method minus {comparison.against} with the same seed and model, percentage points: "
        "mean and standard deviation of the differences over the pairs of seeds."
    )


def seeds_in_words(comparison: Comparison) -> str:
    """How many seeds stand behind the numbers.

    Returns:
        For instance `mean ± standard deviation over 3 seeds (0, 1, 2)`, or `one seed (0)`.
    """
    evaluated = [row for row in comparison.students if row["evaluated"]]
    seeds = sorted({row["seed"] for row in evaluated})
    numbers = {cell["num_seeds"] for cell in comparison.cells if cell["num_seeds"]}
    listed = ", ".join(map(str, seeds))
    if not numbers:
        return "no seed"
    if max(numbers) == 1:
        return f"one seed ({listed})" if len(seeds) == 1 else f"one seed per method and model (of {listed})"
    most = str(max(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
    return f"mean \N{PLUS-MINUS SIGN} standard deviation over {most} seeds ({listed})"


def latency_note(runs: Sequence[Run]) -> str:
    """Under which conditions latency was measured; nothing where it was not."""
    found = [run.evaluation["latency"] for run in runs if run.evaluation and run.evaluation.get("latency")]
    shown = dict.fromkeys(
        f"{each.get('cpu')}, torch {each.get('torch')}, batch {each.get('batch_size')}, "
        f"{each.get('num_threads')} thread"
        for each in found
    )
    if not shown:
        return ""
    warning = "; not comparable between these machines" if len(shown) > 1 else ""
    return f"CPU ms: median time of one image ({'; '.join(shown)}{warning})."


def _num_images(comparison: Comparison) -> str:
    sizes = set()
    for run in comparison.runs:
        split = run.dataset["splits"].get(comparison.split) or {}
        size = split.get("num_rows")
        sizes.add(f"{size:,}" if size else "?")
    return f" ({sizes.pop()} images)" if len(sizes) == 1 else ""


def as_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: the table, its notes, the differences if asked for, and what models cost."""
    parts = [_markdown(comparison_table(comparison, costs=False)), " ".join(notes(comparison))]
    paired = paired_table(comparison)
    if paired is not None:
        parts += [_markdown(paired), paired_note(comparison)]
    models = models_table(comparison)
    if models.rows:
        parts += [_markdown(models), latency_note(comparison.runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(table: TextTable) -> str:
    sides = ["---" if heading in WORDS else "---:" for heading in table.headings]
    lines = [table.headings, sides]
    for row in table.rows:
        lines.append([f"**{_escaped(cell.text)}**" if cell.bold else _escaped(cell.text) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    for sign in ("\\", "|", "*", "_", "<"):
        text = text.replace(sign, f"\\{sign}")
    return text


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the table, what its numbers are, the differences if asked for, and what the models cost."""
    tables = [(comparison_table(comparison, costs=False), notes(comparison))]
    paired = paired_table(comparison)
    if paired is not None:
        tables.append((paired, [paired_note(comparison)]))
    models = models_table(comparison)
    if models.rows:
        tables.append((models, [latency_note(comparison.runs)]))
    for table, sentences in tables:
        shown = as_rich(table)
        if not console.is_terminal:  # a file is as wide as it must be
            console.width = max(console.width, console.measure(shown, options=WIDEST).maximum)
        console.print(shown)
        for sentence in filter(None, sentences):
            console.print(sentence, soft_wrap=True)


def as_rich(table: TextTable) -> Table:
    """The table for a terminal; a teacher's or a model's rows end with a blank line."""
    shown = Table(box=SIMPLE)
    for heading in table.headings:
        word = heading in WORDS
        side: Literal["left", "right"] = "left" if word else "right"
        shown.add_column(
            heading, justify=side, overflow="fold", no_wrap=not word, min_width=6 if word else None
        )
    for row, source, following in zip(table.rows, table.sources, [*table.sources[1:], None], strict=True):
        ends = "method" in table.headings and following is not None and _block(source) != _block(following)
        texts = [Text(cell.text, style="bold" if cell.bold else "") for cell in row]
        shown.add_row(*texts, end_section=ends)
    return shown


def _block(cell: Row) -> tuple[str, ...]:
    return cell["dataset"], cell["role"], str(cell["model"])
