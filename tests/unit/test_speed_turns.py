"""Answers whether costs that are measured in turns are compared as the formula says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.speed.turns import compare


def test_the_ratio_is_that_of_means_with_a_standard_error_that_repeated_draws_confirm() -> None:
    draws = np.random.default_rng(0)
    ratios, errors = zip(
        *(
            compare({"krd": list(draws.normal(4.2, 0.1, 12)), "plain": list(draws.normal(4.0, 0.2, 16))})
            for _ in range(2000)
        ),
        strict=True,
    )
    assert np.mean(ratios) == pytest.approx(1.05, abs=0.003)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.05)
