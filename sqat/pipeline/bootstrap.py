"""How sure a difference between two results is: paired bootstrap over the rows, or queries, of a split.

Every result is measured on the same bootstrap samples, so that the samples of two results can be subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sqat.errors import SqatError
from sqat.files.read import read_bytes
from sqat.files.replace import replace_file

DRAWS = 1000
BOOTSTRAP_FILE = "bootstrap.safetensors"  # in the run folder: every result's metrics on the samples
LEVEL = 0.95
Samples = dict[str, NDArray[np.float64]]  # metric -> [DRAWS]


@dataclass(frozen=True)
class Difference:
    """A result's metric minus that of another one, with its 95 % interval; NaN for a split of one row or query."""

    metric: str
    against: str
    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether the interval is known."""
        return not np.isnan(self.low)


def compare(metric: str, against: str, values: tuple[float, float], samples: tuple[Samples, Samples]) -> Difference:
    """Compare two results of one split.

    Args:
        against: label of the second result.
        values: the metric of both on the whole split; samples: their samples, of the same draws.
    """
    with np.errstate(invalid="ignore"):  # two infinite ratios
        differences = samples[0][metric] - samples[1][metric]
    return Difference(metric, against, values[0] - values[1], *interval_of(differences))


def interval_of(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap samples; those that are not finite do not count."""
    kept = samples[np.isfinite(samples)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def read_samples(directory: Path) -> dict[str, Samples]:
    """Read the samples of a run, by the key of the result; empty where the file is missing or damaged."""
    try:
        tensors = load(read_bytes(directory / BOOTSTRAP_FILE, root=directory))
    except (SqatError, SafetensorError):
        return {}
    found: dict[str, Samples] = {}
    for name, values in tensors.items():
        key, _, metric = name.rpartition("|")
        if values.shape == (DRAWS,) and values.dtype == np.float64:
            found.setdefault(key, {})[metric] = values
    return found


def write_samples(directory: Path, samples: dict[str, Samples]) -> None:
    """Write the samples of a run, by the key of the result."""
    tensors = {f"{key}|{metric}": values for key, each in samples.items() for metric, values in each.items()}
    replace_file(directory / BOOTSTRAP_FILE, save(tensors))
