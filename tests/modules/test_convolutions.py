"""Quantized convolutions: which tensors are sites, and the same numbers as torch's own fake quantizers and conv2d."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqat.modules.activation_quantizers import Quantizers, fake_quantized_
from sqat.modules.batch_norm import fold_batch_norms_, round_conv_biases_
from sqat.modules.site_discovery import discover_sites
from sqat.modules.sites import Sites
from sqat.quantization.placement import PLACEMENTS
from sqat.sparsity.masks import count_violations, nm_mask
from sqat.sparsity.pattern import parse_pattern

LAYERS = ["inner", "shortcut", "last"]


class Block(nn.Module):
    """A residual block whose add is done in place, as transformers' ResNet does it, and a convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU6()
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        hidden = self.shortcut_norm(self.shortcut(pixel_values))
        hidden += self.relu(self.inner_norm(self.inner(pixel_values)))
        return SimpleNamespace(logits=self.last(hidden).mean((2, 3)))


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(1)
    model = Block()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 2)
            nn.init.normal_(module.bias)
    fold_batch_norms_(model.eval())
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 16, 9, 9, generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module, x: Tensor, placement: str = "linear") -> Sites:
    return discover_sites(model, {"pixel_values": x}, LAYERS, [], PLACEMENTS[placement])


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "tensorrt-full"])
def test_inputs_and_outputs_are_sites(block: nn.Module, x: Tensor, placement: str) -> None:
    sites = sites_of(block, x, placement)
    assert set(sites.shared_with) == {f"{name}:{role}" for name in LAYERS for role in ("input", "output")}
    assert sites.shared_with["inner:input"] == "shortcut:input"  # one tensor
    assert sites.shared_with["last:input"] == "last:input"  # the add in place made another tensor of it
    assert sites.skipped == {}


def test_rectifier_limits_apply_where_only_rectifiers_read(block: nn.Module, x: Tensor) -> None:
    assert sites_of(block, x).rectifier_limits == {"inner:output": 6.0}
    block.relu = nn.ReLU(inplace=True)
    assert sites_of(block, x).rectifier_limits == {"inner:output": math.inf}
    block.relu = nn.SiLU()
    assert sites_of(block, x).rectifier_limits == {}


def test_no_rectifier_limit_where_another_function_reads(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(16, 16, 1)

        def forward(self, pixel_values: Tensor) -> SimpleNamespace:
            y = self.inner(pixel_values)
            return SimpleNamespace(logits=y.relu() - y)

    assert discover_sites(Twice(), {"pixel_values": x}, ["inner"], [], PLACEMENTS["linear"]).rectifier_limits == {}


def rounded(x: Tensor, amax: float) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, amax / 127, 0, -128, 127)


def convolved(x: Tensor, layer: nn.Conv2d, bias: Tensor, mask: Tensor) -> Tensor:
    """The layer by torch's own fake quantizer and convolution."""
    weight = layer.weight.detach() * mask
    scale = weight.flatten(1).abs().amax(1) / 127
    weight = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(len(scale)), 0, -127, 127)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def test_outputs_equal_torchs_fake_quantizers(block: nn.Module, x: Tensor) -> None:
    layers = {name: block.get_submodule(name) for name in LAYERS}
    masks = {name: nm_mask(layer.weight.detach().abs(), parse_pattern("2:4")) for name, layer in layers.items()}
    amax = {"shortcut:input": 2.5, "inner:output": 1.5, "shortcut:output": 2.0, "last:input": 3.0, "last:output": 1.0}
    shared_with = sites_of(block, x).shared_with
    quantizers = Quantizers({site: torch.tensor(value) for site, value in amax.items()}, shared_with)
    with fake_quantized_(block, masks, LAYERS, quantizers, []), torch.no_grad():
        got = block(x).logits
    inner, shortcut, last = (layer for layer in layers.values() if isinstance(layer, nn.Conv2d))
    biases = [block.get_submodule(f"{name}_norm").bias for name in ("inner", "shortcut")]
    with torch.no_grad():
        entering = rounded(x, 2.5)
        hidden = F.relu6(rounded(convolved(entering, inner, biases[0], masks["inner"]), 1.5))
        hidden = hidden + rounded(convolved(entering, shortcut, biases[1], masks["shortcut"]), 2.0)
        out = rounded(convolved(rounded(hidden, 3.0), last, last.bias, masks["last"]), 1.0)
    # a value within float rounding of a tie may fall on the other side: one step of 1 / 127 in 25 of the mean
    torch.testing.assert_close(got, out.mean((2, 3)), rtol=0, atol=1.1 / 127 / 25)
    assert (got - out.mean((2, 3))).abs().median() < 1e-6
    for name, layer in layers.items():
        assert not count_violations(layer.weight, parse_pattern("2:4"))
        assert torch.equal(layer.weight == 0, ~masks[name])


def test_learned_amax_trains_through_an_in_place_add(block: nn.Module, x: Tensor) -> None:
    shared_with = sites_of(block, x).shared_with
    quantizers = Quantizers({site: torch.tensor(2.0) for site in set(shared_with.values())}, shared_with, learned=True)
    with fake_quantized_(block, {}, LAYERS, quantizers, []):
        block(x).logits.square().sum().backward()
        assert all(value.grad is not None for value in quantizers.values)


def test_rounded_biases_are_multiples_of_the_int32_step(block: nn.Module) -> None:
    amax = {"inner:input": torch.tensor(2.5), "last:input": torch.tensor(3.0)}
    shared_with = {"inner:input": "inner:input", "shortcut:input": "inner:input", "last:input": "last:input"}
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    round_conv_biases_(block, LAYERS, amax, shared_with, {})
    for layer, owner in (("inner", "inner_norm"), ("shortcut", "shortcut_norm"), ("last", "last")):
        weight = block.get_submodule(layer).weight.detach().double()
        step = weight.flatten(1).abs().amax(1) / 127 * amax[shared_with[f"{layer}:input"]].double() / 127
        bias = block.get_submodule(owner).bias.detach().double()
        steps = bias / step
        assert (steps - steps.round()).abs().max() < 1e-2  # float32 holds a bias of 1e5 steps to 1e-2 of one
        assert ((bias - before[f"{owner}.bias"].double()).abs() <= step * 0.51).all()
    assert all(torch.equal(before[name], p) for name, p in block.named_parameters() if name.endswith("weight"))
