"""Max: nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator

if TYPE_CHECKING:
    from sqat.quantization.histogram import Histogram


@dataclass(frozen=True)
class Maximum(Calibrator):
    """The largest |x|."""

    name: Literal["max"] = "max"

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the largest |x|."""
        return histogram.max_abs
