"""Percentile: a known share of the values is clipped, which more data hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator

if TYPE_CHECKING:
    from sqat.quantization.histogram import Histogram


@dataclass(frozen=True)
class Percentile(Calibrator):
    """The smallest amax that covers a share of the values, to one bin of the histogram.

    Attributes:
        percentile: percentage of the values that are not clipped, in (0, 100].
    """

    name: Literal["percentile"] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], got {self.percentile}")

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the bin edge that covers the share."""
        return histogram.upper_edge(self.percentile)
