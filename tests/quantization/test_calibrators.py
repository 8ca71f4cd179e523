"""Calibrators against numpy on the raw values, and the claim that mse beats max on heavy tails."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sqat.quantization.calibrators import CALIBRATORS, Calibrator
from sqat.quantization.calibrators.calibrator import ZEROS_AMAX
from sqat.quantization.calibrators.entropy import Entropy, count_kept_bins
from sqat.quantization.calibrators.maximum import Maximum
from sqat.quantization.calibrators.mse import MeanSquaredError, integrate_error
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.histogram import Histogram


def histogram_of(x: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.observe(x)
    return histogram


def draw(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(200_000, generator=generator)
    if kind == "normal":
        return normal
    if kind == "uniform":
        return torch.rand(200_000, generator=generator)
    if kind == "relu":
        return normal.relu()
    return normal / torch.rand(200_000, generator=generator).add(0.01)  # heavy tails


def squared_error(x: Tensor, amax: float) -> float:
    scale = amax / 127
    values = x.double().numpy()
    return float(np.mean((values - np.clip(np.round(values / scale), -127, 127) * scale) ** 2))


@pytest.mark.parametrize("kind", ["normal", "uniform", "relu", "heavy"])
def test_percentile_equals_numpy_to_one_bin(kind):
    x = draw(kind)
    histogram = histogram_of(x)
    exact = np.quantile(x.abs().double().numpy(), 0.9999, method="inverted_cdf")
    assert 0 <= Percentile()(histogram) - exact <= histogram.width
    assert Maximum()(histogram) == float(x.abs().max())


@pytest.mark.parametrize("kind", ["normal", "uniform", "relu", "heavy"])
def test_mse_is_the_best_amax_on_the_raw_values(kind):
    x = draw(kind)
    best = min(squared_error(x, float(x.abs().max()) * 0.93**i) for i in range(80))
    assert squared_error(x, MeanSquaredError()(histogram_of(x))) <= best * 1.02


def test_mse_beats_max_on_heavy_tails():
    x = draw("heavy")
    histogram = histogram_of(x)
    assert squared_error(x, MeanSquaredError()(histogram)) < 0.75 * squared_error(x, Maximum()(histogram))


@pytest.mark.parametrize(("x", "scale"), [(0.3, 1.0), (2.7, 0.5), (12.7, 0.1), (20.0, 0.1), (0.0, 1.0)])
def test_error_integral_is_the_numeric_one(x, scale):
    points = (np.arange(200_000) + 0.5) * (x / 200_000)
    steps = np.clip(np.round(points / scale), 0, 127) * scale
    numeric = float(np.sum((points - steps) ** 2)) * x / 200_000
    assert float(integrate_error(torch.tensor(x, dtype=torch.float64), scale)) == pytest.approx(numeric, rel=1e-5)


def kept_by_loop(counts: list[int]) -> int:
    """The KL method as its slides tell it, with one list per candidate."""
    counts = [counts[1], *counts[1:]]
    best, best_divergence = len(counts), math.inf
    for kept in range(len(counts), 127, -1):
        p = [float(c) for c in counts[:kept]]
        p[-1] += sum(counts[kept:])
        level_of = [bin_ * 128 // kept for bin_ in range(kept)]
        mass, filled = [0.0] * 128, [0] * 128
        for bin_, level in enumerate(level_of):
            mass[level] += counts[bin_]
            filled[level] += counts[bin_] > 0
        q = [mass[level] / filled[level] if counts[bin_] else 0.0 for bin_, level in enumerate(level_of)]
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)) or not sum(q):
            continue
        total_p, total_q = sum(p), sum(q)
        divergence = sum(a / total_p * math.log((a / total_p) / (b / total_q)) for a, b in zip(p, q, strict=True) if a)
        if divergence < best_divergence - 1e-12:
            best, best_divergence = kept, divergence
    return best


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
@pytest.mark.parametrize("bins", [130, 400])
def test_kept_bins_equal_those_of_the_loop(kind, bins):
    x = draw(kind)[:5_000].abs().double().numpy()
    counts, _ = np.histogram(x, bins=bins)
    counts[0] = counts[1]
    assert count_kept_bins(torch.from_numpy(counts).double()) == kept_by_loop(counts.tolist())


def test_entropy_equals_the_loop():
    x = draw("heavy")[:20_000]
    histogram = histogram_of(x)
    width = histogram.width * 4
    counts, _ = np.histogram(x.abs().double().numpy(), bins=2048, range=(0, 2048 * width))
    expected = min(kept_by_loop(counts.tolist()) * width, histogram.max_abs)
    assert Entropy()(histogram) == pytest.approx(expected)


def test_entropy_clips_a_lonely_outlier():
    x = torch.cat([draw("normal"), torch.tensor([60.0])])
    assert Entropy()(histogram_of(x)) < 10


@pytest.mark.parametrize("calibrator", [part() for part in CALIBRATORS], ids=lambda part: part.name)
def test_any_data_gives_a_usable_amax(calibrator: Calibrator):
    assert calibrator(histogram_of(torch.zeros(100))) == ZEROS_AMAX
    for x in (torch.tensor([3.0]), torch.full((1000,), -2.0), torch.tensor([1e-38]), torch.tensor([3e38, 1.0])):
        amax = calibrator(histogram_of(x))
        assert 0 < amax <= max(float(x.abs().max()), 2.0**-40)
        assert math.isfinite(float(1 / (torch.tensor(amax) / 127)))


@pytest.mark.parametrize("calibrator", [part() for part in CALIBRATORS], ids=lambda part: part.name)
def test_a_site_of_one_value_keeps_it(calibrator: Calibrator):
    assert calibrator(histogram_of(torch.full((1000,), 0.75))) == pytest.approx(0.75, rel=0.01)


@pytest.mark.parametrize("calibrator", [part() for part in CALIBRATORS], ids=lambda part: part.name)
def test_nearly_all_zeros_give_an_amax(calibrator: Calibrator):
    x = torch.zeros(100_000)
    x[0] = 2.0
    assert 0 < calibrator(histogram_of(x)) <= 2.0


@pytest.mark.parametrize("calibrator", [part() for part in CALIBRATORS], ids=lambda part: part.name)
def test_an_empty_histogram_is_refused(calibrator: Calibrator):
    with pytest.raises(ValueError, match="histogram is empty"):
        calibrator(Histogram())


@pytest.mark.parametrize("percentile", [0.0, 150.0, math.nan])
def test_bad_percentile_is_refused(percentile):
    with pytest.raises(ValueError, match=r"^percentile must lie in \(0, 100\], got"):
        Percentile(percentile=percentile)


@pytest.mark.parametrize("per_octave", [0, -1, 5000])
def test_bad_candidate_counts_are_refused(per_octave):
    with pytest.raises(ValueError, match=r"^per_octave must lie in 1\.\.1024, got"):
        MeanSquaredError(per_octave=per_octave)
