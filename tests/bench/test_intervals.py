"""The interval of a median covers what it should, and is that of the rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.bench.intervals import Interval, median_interval, median_ratio


def test_the_median_ratio_has_an_interval_that_covers_the_truth() -> None:
    random_numbers = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        times = random_numbers.lognormal(0, 0.1, (2, 40))
        ratio = median_ratio(1.5 * times[0], times[1], resamples=300)
        covered += ratio.low <= 1.5 <= ratio.high
    assert covered >= 85  # of 100 intervals of 95 %
    exact = median_ratio(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    assert (exact.median, exact.low, exact.high) == (2, 2, 2)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_the_interval_holds_the_median_and_lies_within_the_values(values: list[float]) -> None:
    found = median_interval(np.array(values), resamples=50)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found.median == np.median(values)
    assert found == median_interval(np.array(values), resamples=50)


def test_more_rounds_make_it_narrower() -> None:
    times = np.random.default_rng(0).lognormal(0, 0.2, 400)
    assert median_interval(times).half_width < median_interval(times[:20]).half_width / 2


def test_half_width_is_of_the_farther_end() -> None:
    assert Interval(median=2.0, low=1.9, high=2.4).half_width == pytest.approx(0.2)
