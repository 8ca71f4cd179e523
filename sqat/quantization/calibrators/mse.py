"""MSE: clipping is weighed against rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.quantization.histogram import Histogram

OCTAVES = 12  # how far the candidates fall


@dataclass(frozen=True)
class MeanSquaredError(Calibrator):
    """The amax with the least expected squared error of rounding and clipping.

    Candidates fall from the maximum geometrically over 12 octaves (factors of two).

    Attributes:
        per_octave: candidates for each octave.
    """

    name: Literal["mse"] = "mse"
    per_octave: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.per_octave <= 1024:
            raise ValueError(f"per_octave must lie in 1..1024, got {self.per_octave}")

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the candidate with the least error, values within a bin taken as spread evenly."""
        candidates = [histogram.max_abs * 2 ** (-i / self.per_octave) for i in range(OCTAVES * self.per_octave)]
        return min(candidates, key=squared_errors(histogram))


def squared_errors(histogram: Histogram) -> Callable[[float], float]:
    """Return the function from amax to the sum of (x - Q(x))**2; values within a bin are spread evenly."""
    import torch

    used = int(histogram.counts.nonzero().max()) + 1
    density = histogram.counts[:used].double() / histogram.width
    edges = torch.arange(used + 1, dtype=torch.float64) * histogram.width
    return lambda amax: float((density * integrate_error(edges, amax / 127).diff()).sum())


def integrate_error(x: Tensor, scale: float) -> Tensor:
    """Integrate (u - Q(u))**2 from 0 to x, where Q rounds to multiples k * scale, k <= 127."""
    if not scale:
        return x.new_zeros(x.shape)
    k = (x / scale).round_().clamp_(max=127)
    return k * (scale**3 / 12) + (x - k * scale) ** 3 / 3  # whole steps, and what lies beyond the last one
