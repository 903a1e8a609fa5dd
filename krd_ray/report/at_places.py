"""Answers how reports come from runs wherever these lie: in a folder or at a URI.

Does not compute or draw; the rest of this layer reads folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from krd_ray.errors import RunError
from krd_ray.report.comparison import Comparison, Split, compare_runs
from krd_ray.report.comparison_page import write_comparison
from krd_ray.report.page import build_report
from krd_ray.report.read_search import is_search
from krd_ray.report.search_page import build_search_report
from krd_ray.report.terminal import print_headline
from krd_ray.storage.places import absolute, require_folder
from krd_ray.storage.working_copy import working_copy


def report_on(place: str) -> str:
    """Writes the report of a run or a search beside it and returns where its page lies.

    Args:
        place: path or URI of the run, path of the search.
    """
    with working_copy(place) as copy:
        page = (build_search_report if is_search(copy.path) else build_report)(copy.path)
    return copy.place_of(page)


def print_headline_of(place: str) -> None:
    """Prints the headline table of a run at a path or URI."""
    with working_copy(place) as copy:
        print_headline(copy.path)


def compare_at(
    places: Sequence[str], out: Path, *, split: Split, against: str | None
) -> tuple[Comparison, list[Path]]:
    """Compares the runs at some places, and writes the comparison to a folder.

    Args:
        places: paths or URIs of run directories, each once.
        out: folder for table, pictures and page.
        split, against: as for `compare_runs`.
    Returns:
        The comparison, and the files written.
    Raises:
        RunError, ConfigError: as `compare_runs`.
    """
    twice = [place for place, num in Counter(map(absolute, places)).items() if num > 1]
    if twice:
        raise RunError(f"{twice[0]} is given twice; name each run directory once")
    require_folder(out, "--out")
    with ExitStack() as stack:
        copies = [stack.enter_context(working_copy(place)) for place in places]
        comparison = compare_runs([copy.path for copy in copies], split=split, against=against)
        return comparison, list(write_comparison(comparison, out))
