"""Mean, spread and paired differences over seeds.

Spread is the sample standard deviation (n - 1). Differences are taken seed by seed, since two rows of a seed share
their dense model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from scripts.results.schema import Seed


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter where there is one value, or an infinite one."""
    array = np.asarray(values, np.float64)
    spread = float(array.std(ddof=1)) if len(array) > 1 and np.isfinite(array).all() else None
    return float(array.mean()), spread


def values_of(seeds: Mapping[int, Seed], label: str, metric: str) -> dict[int, float]:
    """Seed -> a row's metric, for the seeds that have it."""
    rows = {number: seed.rows[label] for number, seed in seeds.items() if label in seed.rows}
    return {number: row.metrics[metric] for number, row in rows.items() if metric in row.metrics}


def differences(seeds: Mapping[int, Seed], label: str, against: str, metric: str) -> list[float]:
    """A row's metric minus another row's, for the seeds that have both and where both are finite."""
    one, other = values_of(seeds, label, metric), values_of(seeds, against, metric)
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    return [a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)]


def outside_spread(rows: Sequence[Sequence[float]]) -> int | None:
    """The row whose mean is above every other's by more than both their spreads; None where there is none."""
    figures = [mean_and_spread(values) if len(values) else (-math.inf, None) for values in rows]
    best = max(range(len(figures)), key=lambda index: figures[index][0], default=None)
    if best is None or len(figures) < 2:
        return None
    mean, spread = figures[best]
    others = [figure for index, figure in enumerate(figures) if index != best and rows[index]]
    clear = all(spread is not None and wide is not None and mean - other > spread + wide for other, wide in others)
    return best if others and clear else None
