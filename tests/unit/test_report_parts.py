"""Answers whether the report's parts keep their promises: colours, bins, places of names, caps."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from krd_ray.report.labels import Box, Stem, place_labels
from krd_ray.report.palette import method_palette
from krd_ray.report.sections import FIGURES, MAX_BARS, MAX_LINES, limited
from krd_ray.report.tables import binned_means


def test_methods_are_told_apart_by_colour_or_marker() -> None:
    names = [f"method {index}" for index in range(96)]
    palette = method_palette([*names, None, names[0]])
    assert list(palette) == [*names, None]
    assert len(set(palette.values())) == len(palette) == 97
    assert len({colour for colour, _ in list(palette.values())[:12]}) == 12


@given(
    pairs=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1)), min_size=1, max_size=60),
    num_bins=st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_bins_cover_every_class_once(pairs: list[tuple[int, float]], num_bins: int) -> None:
    counts, values = [count for count, _ in pairs], [value for _, value in pairs]
    points = binned_means(counts, values, num_bins)
    places = [place for place, _ in points]
    assert 1 <= len(points) <= num_bins
    assert places == sorted(set(places))
    assert min(counts) * (1 - 1e-9) <= places[0] <= places[-1] <= max(counts) * (1 + 1e-9)
    assert min(values) - 1e-9 <= min(y for _, y in points) <= max(y for _, y in points) <= max(values) + 1e-9
    assert binned_means(counts, values, 1)[0][1] == pytest.approx(sum(values) / len(values))


@given(
    places=st.lists(st.tuples(st.floats(0.3, 4.4), st.floats(0.3, 1.2), st.floats(0, 0.9)), max_size=3),
)
@example(places=[(1.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.5, 1.125, 0.5)])
@settings(max_examples=25, deadline=None)
def test_a_few_names_never_cover_each_other(places: list[tuple[float, float, float]]) -> None:
    stems = [Stem(x, low, low + length, width=0.6, height=0.13) for x, low, length in places]
    names = place_labels(stems, Box(0, 0, 4.7, 2.4), marker=0.1)
    assert len(names) == len(stems)
    for index, name in enumerate(names):
        assert name.right - name.left == pytest.approx(0.6)
        assert all(name.overlap(other) < 1e-9 for other in names[:index])


@given(
    places=st.lists(
        st.tuples(st.floats(0.8, 3.9), st.floats(0.3, 1.2), st.floats(0, 0.9), st.floats(0, 0.4)), max_size=3
    ),
)
@settings(max_examples=25, deadline=None)
def test_a_lone_name_stays_off_its_own_points(places: list[tuple[float, float, float, float]]) -> None:
    for x, low, length, reach in places:
        [name] = place_labels(
            [Stem(x, low, low + length, width=0.6, height=0.13, reach=reach)], Box(0, 0, 4.7, 2.4), marker=0.1
        )
        points = Box(x - reach, low, x + reach, low + length)
        assert name.overlap(points) < 1e-9
        assert name.left >= 0
        assert name.right <= 4.7


def rows_of(num_models: int, num_methods: int) -> list[dict[str, object]]:
    teacher = {"name": "teacher", "role": "teacher", "model": "big"}
    return [teacher] + [
        {"name": f"{method}, {model}", "role": "student", "model": model}
        for model in range(num_models)
        for method in range(num_methods)
    ]


@pytest.mark.parametrize(
    ("figure", "num_models", "num_methods", "num_kept"),
    [
        ("accuracy_by_group", 2, 24, 48),
        ("accuracy_by_group", 2, 30, 2 * (MAX_BARS // 2)),
        ("accuracy_by_group", 60, 2, 60),
        ("curves", 3, MAX_LINES, 3 * MAX_LINES),
        ("curves", 3, 20, 3 * MAX_LINES),
        ("class_distribution", 3, 40, 120),
    ],
)
def test_what_a_figure_cannot_show_is_left_out_evenly_and_said(
    figure: str, num_models: int, num_methods: int, num_kept: int
) -> None:
    rows = rows_of(num_models, num_methods)
    drawn, note = limited(rows, FIGURES[figure])
    students = [row for row in drawn if row["role"] == "student"]
    assert len(students) == num_kept
    assert len({sum(row["model"] == model for row in students) for model in range(num_models)}) == 1
    assert drawn[0]["role"] == "teacher"
    said = f" Drawn: {num_kept} of {num_models * num_methods}, the first of each model; the CSV holds all."
    assert note == ("" if num_kept == num_models * num_methods else said)
