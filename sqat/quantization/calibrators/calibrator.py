"""What every calibrator has: settings, and the amax that it chooses from a histogram of |x|.

The scale of a symmetric int8 quantizer is amax / 127. Torch is imported where tensors are handled only: a recipe is
checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqat.quantization.histogram import Histogram

ZEROS_AMAX = 2.0**-6  # of a site that saw only zeros: any scale is right, this one is normal in float16
SMALLEST_AMAX = 2.0**-40  # so that 1 / scale is finite


class Calibrator(ABC):
    """Base of all calibrators; a subclass is a frozen dataclass whose fields are the keys of a recipe."""

    name: str
    rows: int = 0  # of each layer's inputs, on which candidates are compared

    @abstractmethod
    def choose_amax(self, histogram: Histogram) -> float:
        """Return the amax of a histogram that holds a value other than 0."""

    def __call__(self, histogram: Histogram) -> float:
        """Return a positive amax; ValueError where the histogram is empty."""
        if not histogram.total:
            raise ValueError("the histogram is empty")
        return max(self.choose_amax(histogram), SMALLEST_AMAX) if histogram.max_abs else ZEROS_AMAX

    def candidates(self, histogram: Histogram) -> dict[str, float]:
        """Return each amax to choose from under a name: one, unless rows decide."""
        return {self.name: self(histogram)}
