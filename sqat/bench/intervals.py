"""A median and how sure it is: percentile bootstrap over rounds (Efron, 1979).

Rounds are what is drawn again, not calls: calls of one turn share the machine's mood of that moment, so that they are
no independent samples. Left out: parametric intervals; a machine's disturbances are anything but normal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Times = NDArray[np.float64]
COVERAGE = (0.025, 0.975)


class Interval(BaseModel):
    """A median and its 95 % interval."""

    model_config = ConfigDict(extra="forbid")

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Distance from the median to the farther end, as a share of the median."""
        return max(self.high - self.median, self.median - self.low) / self.median


def median_interval(values: Times, resamples: int = 2000) -> Interval:
    """Median of values [R] with a 95 % percentile bootstrap interval; the same values give the same interval."""
    chosen = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), COVERAGE)
    return Interval(median=float(np.median(values)), low=float(low), high=float(high))


def median_ratio(baseline: Times, times: Times, resamples: int = 2000) -> Interval:
    """Median over the rounds [R] of baseline / times: how many times as fast, pair by pair, as `median_interval`."""
    return median_interval(baseline / times, resamples)
