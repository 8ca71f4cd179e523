"""From a histogram of |x| to the bound amax of a symmetric int8 quantizer (scale = amax / 127).

`Percentile` is the default: it clips a known share and is stable under more data. `Maximum` clips nothing,
`MeanSquaredError` weighs clipping against rounding, `Entropy` keeps the distribution's shape (the KL method
that TensorRT describes: S. Migacz, "8-bit inference with TensorRT", GTC 2017). All treat values within a bin
as spread evenly. A site that only saw zeros gets `ZEROS_AMAX`: any scale is right for it, and this one is
small yet normal in float16. Left out: calibration of weights, whose amax is their own maximum per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqat.quantization.histogram import BINS, Histogram
from sqat.quantization.settings import Calibrator, Entropy, Maximum, MeanSquaredError, Percentile

ZEROS_AMAX = 2.0**-6
SMALLEST_AMAX = 2.0**-40  # so that 1 / scale is finite


def find_bound(method: Calibrator, histogram: Histogram) -> float:
    """Return the amax > 0 that a calibrator chooses; ValueError if nothing was observed."""
    if not histogram.total:
        raise ValueError("the histogram has observed nothing")
    return max(_chosen(method, histogram), SMALLEST_AMAX) if histogram.max_abs else ZEROS_AMAX


def _chosen(method: Calibrator, histogram: Histogram) -> float:
    match method:
        case Percentile():
            return histogram.upper_edge(method.coverage)
        case Maximum():
            return histogram.max_abs
        case MeanSquaredError():
            return _least_error(histogram, method.per_octave)
        case Entropy():
            merge = BINS // 2048
            counts = histogram.counts.view(2048, merge).sum(1).double()
            counts[0] = counts[1]
            return min((_least_divergent(counts) * merge) * histogram.width, histogram.max_abs)


def _least_error(histogram: Histogram, per_octave: int) -> float:
    """The candidate with the least expected squared error of rounding and clipping."""
    used = int(histogram.counts.nonzero().max()) + 1
    density = histogram.counts[:used].double() / histogram.width
    edges = torch.arange(used + 1, dtype=torch.float64) * histogram.width
    candidates = [histogram.max_abs * 2 ** (-i / per_octave) for i in range(12 * per_octave)]
    errors = [float((density * _error_up_to(edges, amax / 127).diff()).sum()) for amax in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _error_up_to(x: Tensor, scale: float) -> Tensor:
    """Integrate (u - Q(u))**2 from 0 to x, where Q rounds to multiples k * scale, k <= 127.

    Each whole step contributes scale**3 / 12; the rest, or what lies beyond the last step, is a cube.
    """
    if not scale:
        return torch.zeros_like(x)
    k = (x / scale).round_().clamp_(max=127)
    return k * (scale**3 / 12) + (x - k * scale) ** 3 / 3


def _least_divergent(counts: Tensor, levels: int = 128) -> int:
    """Return how many of the bins to keep; all of them where every divergence is infinite.

    Q is constant within a level, so KL(P || Q) = sum p log p - sum_level P_level log q_level, and running
    sums give both for all candidates at once.
    """
    candidates = torch.arange(levels, len(counts) + 1)
    starts = (candidates.unsqueeze(1) * torch.arange(levels + 1) + levels - 1) // levels
    outliers = counts.sum() - _running_sum(counts)[candidates]
    in_level = _running_sum(counts)[starts].diff()
    per_bin = in_level / _running_sum((counts > 0).double())[starts].diff()
    q = per_bin / in_level.sum(1, keepdim=True)
    p = in_level / counts.sum()
    last = counts[candidates - 1]
    p[:, -1] += outliers / counts.sum()
    plogp = _running_sum(_xlogx(counts / counts.sum()))[candidates]
    plogp += _xlogx((last + outliers) / counts.sum()) - _xlogx(last / counts.sum())
    divergence = plogp - torch.where(p > 0, p * q.log(), 0.0).sum(1)
    divergence[(last == 0) & (outliers > 0)] = torch.inf  # Q is empty in the bin that P puts the outliers in
    best = torch.nan_to_num(divergence, nan=torch.inf).flip(0).argmin()  # of equals, the one that clips least
    return int(candidates.flip(0)[best])


def _running_sum(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _xlogx(values: Tensor) -> Tensor:
    result: Tensor = torch.special.xlogy(values, values)
    return result
