"""An int8 output that several operators read: ONNX Runtime computes it in int8, and TensorRT's rules hold."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from sqat.compress.calibrate import share_amax
from sqat.export.graph import export_float
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings
from sqat.modules.activation_quantizers import Quantizers, fake_quantized_
from sqat.modules.batch_norm import round_conv_biases_
from sqat.modules.site_discovery import discover_sites
from sqat.quantization.fake_quant import quantize_weight
from sqat.quantization.placement import PLACEMENTS
from sqat.runtime.sessions import find_float_products, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators

Make = Callable[[], nn.Module]


class Fork(nn.Module):
    """Two layers; what stands between reads the first one's output."""

    def __init__(self, layer: Make, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.norm = layer(), layer(), nn.LayerNorm(32)
        self.between = between

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = self.between(self, self.first(pixel_values))
        return SimpleNamespace(logits=self.second(x).flatten(2).mean(2))


def norm_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalize the channels, which an image has first and a text last."""
    return norm(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 4 else norm(x)


BETWEEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "silu": lambda _, x: nn.functional.silu(x),
    "residual": lambda _, x: x + torch.tanh(x),
    "rms norm": lambda _, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "directly too": lambda model, x: x + model.second(x),
    "layer norm and add": lambda model, x: x + norm_channels(model.norm, x),
}


def convolution() -> nn.Module:
    return nn.Conv2d(32, 32, 1)


def linear() -> nn.Module:
    return nn.Linear(32, 32, bias=False)


def quantize(model: nn.Module, x: Tensor, placement: str) -> tuple[ModelProto, QuantizedModel, Tensor]:
    """Export a model, and compute what its file must compute."""
    names, inputs = ["first", "second"], {"pixel_values": x}
    sites = discover_sites(model, inputs, names, [], PLACEMENTS[placement])
    values = {site: 2 * 1.0123**i for i, site in enumerate(dict.fromkeys(sites.shared_with.values()))}
    shared_with, values = share_amax(sites, values)
    amax = {site: torch.tensor(value) for site, value in values.items()}
    round_conv_biases_(model, names, amax, shared_with, {})
    with torch.no_grad(), fake_quantized_(model, {}, names, Quantizers(amax, shared_with), []):
        expected = model(x).logits
    weights = {name: quantize_weight(model.get_submodule(name).weight.detach()) for name in names}
    found = QuantizedModel(weights, {site: float(amax[owner]) for site, owner in shared_with.items()})
    return export_float(model, inputs), found, expected


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("layer", "shape", "placement"), [
    (convolution, (3, 32, 8, 8), "linear"),
    (linear, (3, 9, 32), "tensorrt-full"),
])  # fmt: skip
def test_a_fork_runs_in_int8_and_computes_the_same(
    layer: Make, shape: tuple[int, ...], placement: str, between: str
) -> None:
    torch.manual_seed(0)
    model, x = Fork(layer, BETWEEN[between]).eval(), torch.randn(*shape)
    graph, quantized, expected = quantize(model, x, placement)
    for join in (True, False):
        file = insert_qdq(graph, quantized, join_outputs=join)
        logits = run_batches(session(file.SerializeToString(), threads=1), [{"pixel_values": x.numpy()}])
        assert parity(expected.numpy(), logits) < 1e-6
        optimized = optimized_graph(file.SerializeToString())
        assert find_float_products(optimized) == []
        target = "onnx-int8" if join else "tensorrt"
        broken = {finding.rule for finding in list_findings(file, target=target) if not finding.warning}
        assert broken <= {"B14", "T16"}  # an image's size is fixed; the last output is the model's
        if join:
            counts, runs = count_operators(optimized), 3 if between == "directly too" else 2
            assert sum(counts[name] for name in ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat")) == runs
            assert counts["Conv"] + counts["MatMul"] + counts["FusedConv"] == 0


def test_without_a_fork_nothing_is_joined() -> None:
    torch.manual_seed(0)
    model, x = Fork(convolution, lambda _, x: torch.relu(x)).eval(), torch.randn(3, 32, 8, 8)
    graph, quantized, _ = quantize(model, x, "linear")
    assert insert_qdq(graph, quantized, join_outputs=True) == insert_qdq(graph, quantized)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_a_bias_far_larger_than_its_channels_weights_fits_the_int32_sum(scale: float) -> None:
    torch.manual_seed(0)
    model, x = Fork(convolution, lambda _, x: torch.relu(x)).eval(), torch.randn(3, 32, 8, 8)
    with torch.no_grad():
        model.first.weight[::3] *= scale
        model.first.bias[::3] = torch.linspace(-1, 1, 11)
        before = model(x).logits
    graph, quantized, expected = quantize(model, x, "linear")
    with torch.no_grad():
        assert float((model(x).logits - before).abs().max()) < 1e-4  # all biases are rounded to their steps
    logits = run_batches(session(insert_qdq(graph, quantized).SerializeToString()), [{"pixel_values": x.numpy()}])
    assert parity(expected.numpy(), logits) < 1e-6
