"""The histogram against exact quantiles and numpy, and the four faults of the common implementation."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqat.quantization.histogram import BINS, CHUNK, Histogram

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-2, 2, width=32)
BATCHES = st.lists(st.lists(FLOATS | SMALL, min_size=1, max_size=20), min_size=1, max_size=5)
PERCENTILES = st.sampled_from([1e-7, 7.0, 50.0, 90.0, 99.0, 99.99, 99.999, 100.0])


def histogram_of(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.observe(batch)
    return histogram


def assert_same(a: Histogram, b: Histogram) -> None:
    assert (a.exponent, a.max_abs) == (b.exponent, b.max_abs)
    assert torch.equal(a.counts, b.counts)


@settings(deadline=None)
@given(BATCHES, PERCENTILES)
def test_quantiles_are_exact_to_one_bin(batches, percentile):
    histogram = histogram_of(*map(torch.tensor, batches))
    values = sorted(abs(value) for batch in batches for value in batch)
    exact = values[math.ceil(Fraction(str(percentile)) / 100 * len(values)) - 1]
    assert 0 <= histogram.upper_edge(percentile) - exact <= histogram.width
    assert histogram.width <= max(values[-1] / 4096, 2.0**-100)
    assert histogram.max_abs == values[-1]
    assert histogram.total == len(values)


@settings(deadline=None)
@given(BATCHES, st.randoms(use_true_random=False), st.integers(0, 5))
def test_order_and_ranks_do_not_matter(batches, random, cut):
    tensors = list(map(torch.tensor, batches))
    together = histogram_of(torch.cat(tensors))
    random.shuffle(tensors)
    assert_same(histogram_of(*tensors), together)
    merged, other = histogram_of(*tensors[:cut]), histogram_of(*tensors[cut:])
    other_counts = other.counts.clone()
    merged.merge(other)
    assert_same(merged, together)
    assert torch.equal(other.counts, other_counts)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 3e37])
def test_counts_equal_numpy(scale):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul(scale)
    histogram = histogram_of(x)
    expected, _ = np.histogram(x.abs().double().numpy(), bins=BINS, range=(0, BINS * histogram.width))
    assert histogram.counts.tolist() == expected.tolist()


def test_many_parts_count_every_value_once():
    x = torch.randn(5, CHUNK // 2 + 7, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([True, True, False, True, True])
    histogram = Histogram()
    histogram.observe(x, keep)
    expected, _ = np.histogram(x[keep].abs().numpy(), bins=BINS, range=(0, BINS * histogram.width))
    assert histogram.counts.tolist() == expected.tolist()


def test_fault_one_almost_all_mass_in_the_first_bin():
    x = torch.zeros(1_000_000)
    x[0] = 5.0
    edge = histogram_of(x).upper_edge(99.99)
    assert 0 < edge <= 5 / 4096


def test_fault_two_a_tiny_first_batch_does_not_fix_the_width():
    histogram = histogram_of(torch.full((10,), 1e-3), torch.full((90,), 1e2))
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.count_nonzero() == 2
    assert histogram.upper_edge(50) == 100.0


def test_fault_three_counts_pass_two_to_the_24():
    histogram = histogram_of(torch.ones(3))
    for _ in range(40):
        histogram.merge(histogram)
    histogram.observe(torch.ones(1))
    assert histogram.total == 3 * 2**40 + 1


def test_padding_does_not_count():
    x = torch.randn(2, 3, 4)
    keep = torch.tensor([[True, True, False], [False, True, True]])
    expected = histogram_of(x[keep])
    x[~keep] = torch.nan
    histogram = Histogram()
    histogram.observe(x, keep)
    assert_same(histogram, expected)


def test_keep_is_broadcast_over_heads():
    x = torch.rand(2, 4, 3, 5)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    histogram = Histogram()
    histogram.observe(x, keep[:, None])
    assert_same(histogram, histogram_of(x.transpose(1, 2)[keep]))


def test_keep_may_name_single_values_or_none():
    x = torch.rand(3, 4)
    histogram = Histogram()
    histogram.observe(x, x > 0.5)
    assert_same(histogram, histogram_of(x[x > 0.5]))
    histogram.observe(x, torch.zeros(3, dtype=torch.bool))
    histogram.observe(x[:0], torch.zeros(0, dtype=torch.bool))
    histogram.observe(x[:0])
    assert_same(histogram, histogram_of(x[x > 0.5]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = torch.ones(4, CHUNK)
    x[1, 5] = x[3, 0] = bad
    with pytest.raises(ValueError, match=f"2 of {4 * CHUNK} values are NaN or infinite"):
        Histogram().observe(x)
    with pytest.raises(ValueError, match="1 of"):
        Histogram().observe(x, torch.tensor([True, True, True, False]))


def test_values_beyond_float32_are_refused():
    with pytest.raises(ValueError, match="1 of 2 values"):
        Histogram().observe(torch.tensor([1e300, 1.0], dtype=torch.float64))


def test_half_precision_is_read_exactly():
    x = torch.randn(500).bfloat16()
    assert_same(histogram_of(x), histogram_of(x.float()))


@settings(deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=50), st.floats(0, 3))
def test_share_beyond_is_exact_but_for_the_bin_of_amax(values, amax):
    histogram = histogram_of(torch.tensor(values))
    share = histogram.share_beyond(amax)
    low, high = amax - histogram.width, amax + histogram.width
    assert sum(abs(v) > high for v in values) / len(values) <= share + 1e-12
    assert share - 1e-12 <= sum(abs(v) > low for v in values) / len(values)


def test_share_beyond_a_percentile_is_the_rest():
    histogram = histogram_of(torch.randn(100_000, generator=torch.Generator().manual_seed(2)))
    assert histogram.share_beyond(histogram.upper_edge(99)) == pytest.approx(0.01, abs=1e-3)
    assert histogram.share_beyond(histogram.max_abs) == 0
    assert histogram.share_beyond(0.0) == 1


def test_zeros_alone_have_a_histogram():
    histogram = histogram_of(torch.zeros(10))
    assert (histogram.total, histogram.max_abs, histogram.upper_edge(99.99)) == (10, 0.0, 0.0)
    assert histogram.share_beyond(0.0) == 0


def test_an_empty_histogram_has_no_quantile():
    with pytest.raises(ValueError, match="histogram is empty"):
        Histogram().upper_edge(50)
    with pytest.raises(ValueError, match="histogram is empty"):
        Histogram().share_beyond(1.0)


@pytest.mark.parametrize("percentile", [0.0, -1.0, 110.0, math.nan])
def test_bad_percentile_is_refused(percentile):
    with pytest.raises(ValueError, match="percentile must lie in"):
        histogram_of(torch.ones(1)).upper_edge(percentile)


def test_a_summary_is_the_same_histogram_with_wider_bins() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3
    histogram = Histogram()
    histogram.observe(x)
    width, counts = histogram.summary(64)
    expected, _ = np.histogram(x.abs().numpy(), bins=64, range=(0, 64 * width))
    assert counts == expected[: len(counts)].tolist()
    assert sum(counts) == 5000
    assert counts[-1] > 0
    assert Histogram().summary()[1] == []
