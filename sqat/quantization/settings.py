"""What a recipe may say of calibration: each calibrator by its name and its knobs.

Settings only, without torch, so that a recipe is read and checked in no time; what they mean for a histogram is in
`sqat.quantization.calibrators`. A new one joins the alias at the foot, and mypy then asks for its case there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Percentile:
    """The smallest bound that covers a share of the values, at bin resolution."""

    name: Literal["percentile"] = "percentile"
    coverage: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must lie in (0, 1], got {self.coverage}")


@dataclass(frozen=True)
class Maximum:
    """The largest |x| seen."""

    name: Literal["max"] = "max"


@dataclass(frozen=True)
class MeanSquaredError:
    """The bound with the least expected squared error of rounding and clipping.

    Candidates fall from the maximum geometrically, ``per_octave`` for each factor of two, over 12 octaves.
    """

    name: Literal["mse"] = "mse"
    per_octave: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.per_octave <= 1024:
            raise ValueError(f"per_octave must lie in 1..1024, got {self.per_octave}")


@dataclass(frozen=True)
class Entropy:
    """The bound at which 128 levels keep most of the distribution's shape (least KL divergence).

    As TensorRT describes it, over 2048 bins: P is the clipped histogram with the outliers put in its last
    bin, Q spreads each level's mass evenly over the level's occupied bins. The first bin takes the count of
    the second, as in NVIDIA's code: exact zeros cost no scale anything.
    """

    name: Literal["entropy"] = "entropy"


Calibrator = Percentile | Maximum | MeanSquaredError | Entropy
