"""Auto: of the amax of several calibrators, the one that harms what reads the site least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator
from sqat.quantization.calibrators.maximum import Maximum
from sqat.quantization.calibrators.mse import MeanSquaredError, squared_errors
from sqat.quantization.calibrators.percentile import Percentile

if TYPE_CHECKING:
    from sqat.quantization.histogram import Histogram

CANDIDATES: dict[str, Calibrator] = {
    **{f"percentile {share}": Percentile(percentile=share) for share in (99.99, 99.999, 99.9999)},
    "mse": MeanSquaredError(),
    "max": Maximum(),
}


@dataclass(frozen=True)
class Auto(Calibrator):
    """For each site one of percentile 99.99, 99.999, 99.9999, mse and max: what harms its reader least.

    The harm at a layer's inputs x is the mean of ||Q(x) W_q - x W||^2 / ||x W||^2 over rows drawn from all batches,
    with the layer's int8 weights W_q. At other sites it is E||Q(x) - x||^2 / E||x||^2.

    Attributes:
        rows: rows of x that are drawn for each layer.
    """

    name: Literal["auto"] = "auto"
    rows: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= 65536:
            raise ValueError(f"rows must lie in 1..65536, got {self.rows}")

    def candidates(self, histogram: Histogram) -> dict[str, float]:
        """Return the amax of each method to choose from."""
        return {name: calibrator(histogram) for name, calibrator in CANDIDATES.items()}

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the candidate with the least E||Q(x) - x||^2, which needs no rows."""
        return min(self.candidates(histogram).values(), key=squared_errors(histogram))
