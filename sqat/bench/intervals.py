"""Medians with confidence intervals: percentile bootstrap over rounds (Efron, 1979).

Rounds are resampled, not calls: the calls of one turn depend on the same state of the machine.
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
    """Return the median of values [R] with its 95 % percentile bootstrap interval; the result is deterministic."""
    samples = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[samples], axis=1), COVERAGE)
    return Interval(median=float(np.median(values)), low=float(low), high=float(high))


def median_ratio(baseline: Times, times: Times, resamples: int = 2000) -> Interval:
    """Return the median speed-up over rounds [R], baseline / times, with its interval."""
    return median_interval(baseline / times, resamples)
