"""Entropy: the shape of the distribution is kept, as TensorRT does (S. Migacz, "8-bit inference", GTC 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.quantization.calibrators.calibrator import Calibrator

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.quantization.histogram import Histogram

BINS = 2048
LEVELS = 128


@dataclass(frozen=True)
class Entropy(Calibrator):
    """The amax at which 128 levels keep most of the distribution's shape (least KL divergence).

    P is the clipped histogram of 2048 bins with the outliers in its last bin. Q spreads each level's mass evenly over
    the level's occupied bins. The first bin takes the count of the second, so that exact zeros do not count.
    """

    name: Literal["entropy"] = "entropy"

    def choose_amax(self, histogram: Histogram) -> float:
        """Return the upper edge of the bins that are kept."""
        merge = histogram.counts.numel() // BINS
        counts = histogram.counts.view(BINS, merge).sum(1).double()
        counts[0] = counts[1]
        return min((count_kept_bins(counts) * merge) * histogram.width, histogram.max_abs)


def count_kept_bins(counts: Tensor) -> int:
    """Return how many bins to keep; all of them where every divergence is infinite.

    Q is constant within a level, so KL(P || Q) = sum p log p - sum_level P_level log q_level. Running sums give both
    for all candidates at once.
    """
    import torch

    candidates = torch.arange(LEVELS, len(counts) + 1)
    starts = (candidates.unsqueeze(1) * torch.arange(LEVELS + 1) + LEVELS - 1) // LEVELS
    outliers = counts.sum() - sum_before(counts)[candidates]
    in_level = sum_before(counts)[starts].diff()
    per_bin = in_level / sum_before((counts > 0).double())[starts].diff()
    q = per_bin / in_level.sum(1, keepdim=True)
    p = in_level / counts.sum()
    last = counts[candidates - 1]
    p[:, -1] += outliers / counts.sum()
    plogp = sum_before(xlogx(counts / counts.sum()))[candidates]
    plogp += xlogx((last + outliers) / counts.sum()) - xlogx(last / counts.sum())
    divergence = plogp - torch.where(p > 0, p * q.log(), 0.0).sum(1)
    divergence[(last == 0) & (outliers > 0)] = torch.inf  # Q is empty in the bin that P puts the outliers in
    best = torch.nan_to_num(divergence, nan=torch.inf).flip(0).argmin()  # of equals, the one that clips least
    return int(candidates.flip(0)[best])


def sum_before(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... values."""
    import torch

    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def xlogx(values: Tensor) -> Tensor:
    """Return x log x, 0 at 0."""
    return values.xlogy(values)
