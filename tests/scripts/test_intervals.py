"""Intervals of differences on the results page."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.results.intervals import pair_intervals
from sqat.pipeline.bootstrap import DRAWS


def test_intervals_are_over_seeds_and_rows() -> None:
    """Two seeds that differ by 2 points, samples of rows with a spread of 1 point: variances of both add up."""
    random = np.random.default_rng(1)
    rows = random.normal(0, 0.01, (2, DRAWS))
    samples = {seed: {"a": {"ndcg": 0.7 + shift + rows[seed]}, "b": {"ndcg": np.full(DRAWS, 0.7)}}
               for seed, shift in enumerate((0.01, -0.01))}  # fmt: skip
    found = {(each.row, each.against): each for each in pair_intervals(samples, ["a", "b", "c"])}
    assert set(found) == {("a", "b"), ("b", "a")}
    one, other = found["a", "b"], found["b", "a"]
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    # of the mean of two drawn seeds: the shift has variance 0.01^2 / 2, the rows 0.01^2 * (1/2 or 1 by the draw)
    expected = 1.96 * math.sqrt(0.01**2 / 2 + 0.01**2 * 3 / 4)
    assert one.high - one.low == pytest.approx(2 * expected, rel=0.12)
