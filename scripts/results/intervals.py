"""Intervals of the difference of two rows over seeds and over the rows of a split.

A bootstrap sample draws seeds and rows anew; all rows of a seed share the drawn rows, so that differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import numpy as np

from scripts.results.schema import PairInterval
from sqat.pipeline.bootstrap import DRAWS, Samples, interval_of


def pair_intervals(samples: Mapping[int, Mapping[str, Samples]], labels: Sequence[str]) -> list[PairInterval]:
    """Return the interval of every two rows that all seeds have, in every metric.

    Args:
        samples: seed -> row -> metric -> the metric on each bootstrap sample of the split.
    """
    shared = [label for label in labels if samples and all(label in rows for rows in samples.values())]
    return [each for row, against in permutations(shared, 2) for each in compare_rows(samples, row, against)]


def compare_rows(samples: Mapping[int, Mapping[str, Samples]], row: str, against: str) -> Iterator[PairInterval]:
    """Yield the interval of each metric that both rows have in all seeds."""
    seeds = list(samples.values())
    drawn = np.random.default_rng(0).integers(len(seeds), size=(DRAWS, len(seeds)))
    for metric in sorted(seeds[0][row]):
        if all(metric in rows[label] for rows in seeds for label in (row, against)):
            with np.errstate(invalid="ignore"):  # two infinite ratios
                differences = np.stack([rows[row][metric] - rows[against][metric] for rows in seeds], axis=1)
            low, high = interval_of(np.take_along_axis(differences, drawn, axis=1).mean(axis=1))
            if math.isfinite(low):  # else no sample has a finite difference
                yield PairInterval(row=row, against=against, metric=metric, low=low, high=high)
