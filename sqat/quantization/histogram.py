"""A histogram of |x| that needs no first look at the data and adds up over batches and processes.

Bins start at 0 and are 2**exponent wide. Where a value lies beyond the last bin, neighbouring bins are merged. Widths
are powers of two: the result depends neither on the order of batches nor on processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from sqat.runtime import kernels

BINS = 8192
CHUNK = 2**18  # values counted at once: memory this small is reused
MIN_EXPONENT = -100  # exponent of the width before any value: 1/width and width * BINS stay normal in float32


class Histogram:
    """Counts of |x| in `BINS` bins [i * width, (i + 1) * width), and the exact largest |x|.

    Attributes:
        counts: int64 [BINS], on the CPU.
        exponent: the width is ``2.0**exponent``.
        max_abs: the largest |x|, exact in float32; 0 before any value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent = MIN_EXPONENT
        self.max_abs = 0.0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def total(self) -> int:
        """Number of values observed."""
        return int(self.counts.sum())

    def observe(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Count the values of ``x``.

        Args:
            x: floats of any shape, read as float32.
            keep: bool, broadcast over the leading dimensions of ``x`` ([B, T] for [B, T, H], [B, 1, T] for
                [B, heads, T, T]); where False, values do not count.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        for part in _chunks(x.detach(), keep):
            if not part.numel():
                continue
            values = part.to(torch.float32)
            has_kernel = kernels.is_supported(values)
            peak = kernels.abs_max(values) if has_kernel else float(values.abs().max())  # NaN and infinity pass through
            if not math.isfinite(peak):
                count = sum(int((~part.float().isfinite()).sum()) for part in _chunks(x.detach(), keep))
                raise ValueError(f"{count} of {x.numel()} values are NaN or infinite")
            self._cover(peak)
            if has_kernel:
                kernels.count_bins_(self.counts, values, self.width)
            else:
                bins = (values.abs() / self.width).to(torch.int32)  # exact: the width is a power of two
                self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def _cover(self, peak: float) -> None:
        """Widen the bins until ``peak`` lies in one of them."""
        self.max_abs = max(self.max_abs, peak)
        if peak:
            self._widen(math.frexp(peak)[1] - int(math.log2(BINS)))

    def _widen(self, exponent: int) -> None:
        """Merge neighbouring bins until they are 2**exponent wide."""
        shift = exponent - self.exponent
        if shift <= 0:
            return
        merged = torch.arange(BINS) >> min(shift, 63)
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts)
        self.exponent = exponent

    def merge(self, other: Histogram) -> None:
        """Add the values that another histogram has observed."""
        self._widen(other.exponent)
        self.counts += _widened(other, self.exponent)
        self.max_abs = max(self.max_abs, other.max_abs)

    def upper_edge(self, percentile: float) -> float:
        """Return the smallest bin edge that covers a share of the values, at most ``max_abs``.

        It is at least the exact quantile (the ``ceil(percentile / 100 * total)``-th smallest |x|) and exceeds it by
        at most one bin width.

        Raises:
            ValueError: the histogram is empty, or percentile is outside (0, 100].
        """
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
        if not self.total:
            raise ValueError("the histogram is empty")
        rank = math.ceil(Fraction(str(percentile)) / 100 * self.total)  # 7 % of 100 is 7, in floats a bit more
        crossing = int(torch.searchsorted(self.counts.cumsum(0), rank))
        return min((crossing + 1) * self.width, self.max_abs)

    def share_beyond(self, amax: float) -> float:
        """Return the share of values with |x| > amax; those in the bin of amax count as spread evenly.

        Raises:
            ValueError: the histogram is empty.
        """
        if not self.total:
            raise ValueError("the histogram is empty")
        if amax >= self.max_abs:
            return 0.0
        position = max(amax, 0.0) / self.width
        bin_ = int(position)
        beyond = int(self.counts[bin_ + 1 :].sum()) + float(self.counts[bin_]) * (bin_ + 1 - position)
        return beyond / self.total

    def summary(self, bins: int = 64) -> tuple[float, list[int]]:
        """Return width and counts of ``bins`` wider bins (a power of two), without empty ones at the end; for plots."""
        merge = BINS // bins
        counts: list[int] = self.counts.view(bins, merge).sum(1).tolist()
        while counts and not counts[-1]:
            counts.pop()
        return self.width * merge, counts


def _chunks(x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
    """Yield the values of ``x`` that count as 1-D tensors of about `CHUNK` values."""
    if keep is None or bool(keep.all()):
        yield from x.reshape(-1).split(CHUNK)
        return
    kept = keep.expand(x.shape[: keep.dim()]).flatten()
    rows = x.reshape(len(kept), x.shape[keep.dim() :].numel())
    for part in kept.nonzero().squeeze(1).split(max(1, CHUNK // max(1, rows.shape[1]))):
        yield rows.index_select(0, part).flatten()  # whole rows at a time, unlike rows[part]


def _widened(histogram: Histogram, exponent: int) -> Tensor:
    """Return the counts in wider bins."""
    copy = Histogram()
    copy.counts, copy.exponent = histogram.counts, histogram.exponent
    copy._widen(exponent)
    return copy.counts
