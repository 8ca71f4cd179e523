"""The choice of method `auto`: the harm of each candidate, by numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sqat.compress.calibrate import calibrate
from sqat.compress.judge_amax import RowSample
from sqat.modules.sites import Site
from sqat.quantization.calibrators.auto import CANDIDATES, Auto
from sqat.quantization.calibrators.percentile import Percentile
from sqat.quantization.histogram import Histogram
from sqat.sparsity.columns import input_windows


class Block(nn.Module):
    """Two linears that read one tensor, and one that reads their sum."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(inputs, 6), nn.Linear(inputs, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x)) + self.second(x))
        return y


class Model(nn.Module):
    """An encoder of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    @property
    def block(self) -> Any:
        return self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[0](x)
        return y


LAYERS = [f"blocks.0.{name}" for name in ("first", "second", "last")]
FIRST = Site("blocks.0.first:input")


def heavy_inputs(rows: int = 64, seed: int = 0, period: int = 16) -> Tensor:
    """Inputs [1,N,8], one column of which is very large once in a while."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, 8, generator=generator)
    x[0, ::period, 3] = 100 + x[0, ::period, 3]
    return x


def amax_of_candidates(x: Tensor) -> dict[str, float]:
    histogram = Histogram()
    histogram.observe(x)
    return {name: calibrator(histogram) for name, calibrator in CANDIDATES.items()}


def round_rows(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return np.round(weight / scale) * scale


def harm_by_numpy(x: np.ndarray, weight: np.ndarray, amax: float, low: int = -128) -> float:
    """The mean of ||Q(x) W_q - x W||^2 / ||x W||^2 over the rows."""
    scale = amax / 127
    rounded = np.clip(np.round(x / scale), low, 127) * scale
    exact = x @ weight.T
    errors = rounded @ round_rows(weight).T - exact
    return float(np.mean([(error**2).sum() / (row**2).sum() for error, row in zip(errors, exact, strict=True)]))


@pytest.mark.parametrize(("gain", "period", "is_clipped"), [(1.0, 2000, True), (0.0, 3000, True), (1.0, 3, False)])
def test_the_chosen_amax_harms_the_product_least(gain: float, period: int, is_clipped: bool) -> None:
    """What is large in one row of thousands, or meets no weight, is clipped; what is large in every third is not."""
    model, x = Model(), heavy_inputs(20_000, period=period)
    with torch.no_grad():
        model.block.first.weight[:, 3] *= gain
        model.block.second.weight[:, 3] *= gain
    found = calibrate(model, [{"x": x}], Auto(rows=20_000), "linear", LAYERS)
    weight = torch.cat([model.block.first.weight, model.block.second.weight]).detach().double().numpy()
    amaxes = amax_of_candidates(x)
    harms = {name: harm_by_numpy(x[0].double().numpy(), weight, amax) for name, amax in amaxes.items()}
    best = min(harms, key=harms.__getitem__)
    assert found.methods[FIRST] == found.methods["blocks.0.second:input"] == best
    assert float(found.amax[FIRST]) == pytest.approx(amaxes[best])
    assert (float(found.amax[FIRST]) < 0.5 * float(x.abs().max())) == is_clipped


def test_errors_are_those_of_numpy() -> None:
    model, x = Model(), heavy_inputs()
    sample = RowSample(model, [FIRST], 64)
    sample.observe(FIRST, x, None, 0)
    weight = model.block.first.weight.detach().double().numpy()
    for low in (-128, -127):
        expected = [harm_by_numpy(x[0].double().numpy(), weight, amax, low) for amax in (0.5, 3.0, 100.0)]
        assert sample.product_errors([0.5, 3.0, 100.0], low) == pytest.approx(expected, rel=1e-3)


def test_a_site_without_a_product_takes_the_least_error_of_its_own() -> None:
    """Method mse searches for just that; the percentiles and the maximum cannot be better."""
    x = torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(1)), torch.tensor([40.0])])
    histogram = Histogram()
    histogram.observe(x)

    def error(amax: float) -> float:
        scale = amax / 127
        return float((np.clip(np.round(x.numpy() / scale), -128, 127) * scale - x.numpy()).__pow__(2).sum())

    errors = {name: error(calibrator(histogram)) for name, calibrator in CANDIDATES.items()}
    assert Auto()(histogram) == CANDIDATES[min(errors, key=errors.__getitem__)](histogram)


def test_rows_are_a_bounded_share_of_the_real_positions() -> None:
    """Every row of the sample is a real one, none comes twice, and padding never does."""
    model, site = Model(), FIRST
    sample = RowSample(model, [site], 16)
    x = torch.arange(3 * 4 * 8.0).view(3, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    for number in range(3):
        sample.observe(site, x + 1000 * number, mask, number)
    real = torch.cat([(x + 1000 * number)[mask.bool()] for number in range(3)])
    firsts = sample.rows[:, 0].tolist()
    assert len(set(firsts)) == 16
    assert set(firsts) <= set(real[:, 0].tolist())
    assert sample.ranks.isfinite().all()


def test_rows_do_not_depend_on_how_batches_are_shared() -> None:
    model, site = Model(), FIRST
    batches = [heavy_inputs(10, seed) for seed in range(4)]

    def draw(numbers: list[int]) -> RowSample:
        sample = RowSample(model, [site], 16)
        for number in numbers:
            sample.observe(site, batches[number], None, number)
        return sample

    together, even, odd = draw([0, 1, 2, 3]), draw([0, 2]), draw([1, 3])
    even.add(odd.rows, odd.ranks)
    assert torch.equal(even.rows, together.rows)
    assert torch.equal(even.ranks, together.ranks)


def test_a_convolution_is_judged_by_its_windows() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 5, 3, padding=1)

    torch.manual_seed(0)
    net, site = Net(), Site("conv:input")
    x = torch.randn(3, 4, 6, 6)
    sample = RowSample(net, [site], 500)
    sample.observe(site, x, None, 0)
    windows = {tuple(row) for row in input_windows(net.conv, x).tolist()}
    kept = sample.rows[sample.ranks.isfinite()]
    assert len(kept) == 3 * 36
    assert {tuple(row) for row in kept.tolist()} == windows
    weight = net.conv.weight.detach().double().permute(0, 2, 3, 1).flatten(1).numpy()
    expected = harm_by_numpy(kept.double().numpy(), weight, 1.5)
    assert sample.product_errors([1.5], -128) == [pytest.approx(expected, rel=1e-3)]


def test_sites_with_one_amax_are_judged_together() -> None:
    """The outputs of first and second share an amax: the sum of both relative errors decides."""
    model, x = Model(), heavy_inputs()
    with torch.no_grad():
        model.block.second.weight[:, 3] = 0.0
    found = calibrate(model, [{"x": x}], Auto(), "tensorrt-full", LAYERS)
    sites = [site for site in found.shared_with if site.endswith(":output") and not site.startswith(LAYERS[2])]
    assert len({found.shared_with[site] for site in sites}) == 1
    assert len({found.methods[site] for site in sites}) == 1
    seen = {name: getattr(model.block, name)(x).detach() for name in ("first", "second")}
    candidates = {name: amax_of_candidates(y) for name, y in seen.items()}

    def harm(method: str) -> float:
        amax = max(found_amax[method] for found_amax in candidates.values())
        scale, total = amax / 127, 0.0
        for y in seen.values():
            rounded = (y.double() / scale).round().clamp(-128, 127) * scale
            total += float((rounded - y).square().sum() / y.double().square().sum())
        return total

    best = min(CANDIDATES, key=harm)
    chosen = found.methods[sites[0]]
    assert harm(chosen) == pytest.approx(harm(best), rel=0.05)


def test_one_candidate_is_not_judged() -> None:
    found = calibrate(Model(), [{"x": heavy_inputs()}], Percentile(), "linear", LAYERS)
    assert found.methods == {}
