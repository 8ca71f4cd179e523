"""How a histogram becomes an amax: one file a calibrator, with its settings and its code.

A recipe, `sqat.api` and the reference page take their names from `CALIBRATORS`.
"""

from __future__ import annotations

from sqat.quantization.calibrators.auto import Auto
from sqat.quantization.calibrators.calibrator import Calibrator as Calibrator
from sqat.quantization.calibrators.entropy import Entropy
from sqat.quantization.calibrators.maximum import Maximum
from sqat.quantization.calibrators.mse import MeanSquaredError
from sqat.quantization.calibrators.percentile import Percentile

CALIBRATORS: tuple[type[Calibrator], ...] = (Percentile, Maximum, MeanSquaredError, Entropy, Auto)
