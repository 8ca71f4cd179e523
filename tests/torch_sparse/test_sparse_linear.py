"""A sparse linear against the fake-quantized one it replaces, at every number of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense

from sqat.quantization.fake_quant import fake_quantize, fake_quantize_weight, quantize_weight
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern
from sqat.sparsity.semi_structured import pack
from sqat.torch_sparse.backends import CuSparseLt, Epilogue, Operand, Reference
from sqat.torch_sparse.linear import Scales, SparseLinear, insert_sparse_, quantize, remove_sparse_
from sqat.torch_sparse.plans import Plan

AMAX = torch.tensor(2.3)
MakeLayer = Callable[[nn.Linear], SparseLinear]


def plain_layer(inputs: int = 64, outputs: int = 96, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A linear whose weight is 2:4."""
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias)
    linear.weight.data *= nm_mask(linear.weight.detach().abs(), parse_pattern("2:4"))
    return linear.requires_grad_(False)


def int8_layer(linear: nn.Linear, amax: Tensor = AMAX, backend: Reference | None = None) -> SparseLinear:
    integers, scale = quantize_weight(linear.weight)
    return SparseLinear(pack(integers), backend or Reference(), Scales(amax / 127, scale), linear.bias)


def half_layer(linear: nn.Linear, kind: torch.dtype = torch.float16) -> SparseLinear:
    return SparseLinear(pack(linear.weight.to(kind)), Reference(), None, linear.bias)


def fake_quantized(linear: nn.Linear, x: Tensor, amax: Tensor = AMAX) -> Tensor:
    """What the layer computed in quantization-aware training."""
    weight = fake_quantize_weight(linear.weight, linear.weight != 0)
    return nn.functional.linear(fake_quantize(x, amax), weight, linear.bias)


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_integers_are_those_of_the_fake_quantizer(seed: int, amax: float) -> None:
    bound = torch.tensor(amax)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed)) * bound
    x[0] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.5, -128.5]) * (bound / 127)  # ties, or nearly
    x[1, :2] = torch.tensor([1e30, -1e30])
    integers = quantize(x, bound / 127)
    assert integers.dtype == torch.int8
    assert torch.equal(integers.float() * (bound / 127), fake_quantize(x, bound) + 0.0)
    seen = torch.fake_quantize_per_tensor_affine(x, bound / 127, torch.tensor(0, dtype=torch.int32), -128, 127)
    assert torch.equal(integers, (seen / (bound / 127)).round().to(torch.int8))


def test_weights_are_those_of_the_fake_quantizer() -> None:
    linear = plain_layer()
    assert torch.equal(int8_layer(linear).dense(), fake_quantize_weight(linear.weight, linear.weight != 0))
    assert torch.equal(half_layer(linear).dense(), linear.weight.half().float())


@pytest.mark.parametrize("bias", [True, False])
def test_every_number_of_tokens_gives_the_fake_quantized_result(bias: bool) -> None:
    linear = plain_layer(bias=bias)
    sparse = int8_layer(linear)
    x = torch.randn(70, 64) * 1.5
    for tokens in range(1, 71):
        torch.testing.assert_close(sparse(x[:tokens]), fake_quantized(linear, x[:tokens]), rtol=1e-5, atol=1e-5)
    statistics = sparse.backend.plans.statistics
    assert (statistics.misses, statistics.hits, statistics.size) == (5, 65, 5), "70 tokens make 5 sizes of 16"
    assert [key.tokens for key in sparse.backend.plans.keys()] == [16, 32, 48, 64, 80]  # noqa: SIM118


def test_scales_that_are_powers_of_two_leave_no_difference_at_all() -> None:
    """Every product and sum is then exact in float32, so that any wrong integer shows."""
    linear = plain_layer(bias=False)
    linear.weight.data = (torch.randint(-127, 128, (96, 64)) * nm_mask(torch.rand(96, 64), parse_pattern("2:4"))) / 1024
    linear.weight.data[:, 0], linear.weight.data[:, 1:4] = 127 / 1024, 0
    amax = torch.tensor(127 / 32)
    x = torch.randn(70, 64) * 3
    assert torch.equal(int8_layer(linear, amax)(x), fake_quantized(linear, x, amax))


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_padding_and_company_change_no_bit(kind: str) -> None:
    linear = plain_layer()
    x = torch.randn(70, 64)
    if kind == "float16":  # multiples of 1/4, so that float32 sums are exact in any order
        linear.weight.data = (linear.weight * 100).round() / 4
        linear.bias.data = (linear.bias * 100).round() / 4
        x = (x * 10).round() / 4
    sparse = int8_layer(linear) if kind == "int8" else half_layer(linear)
    whole = sparse(x)
    for tokens in range(1, 71):
        assert torch.equal(sparse(x[:tokens]), whole[:tokens])
        assert torch.equal(sparse(x[-tokens:]), whole[-tokens:])


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (2, 3, 4, 64), (0, 64), (2, 0, 64)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    linear = plain_layer()
    x = torch.randn(shape)
    y = int8_layer(linear)(x)
    assert y.shape == (*shape[:-1], 96)
    torch.testing.assert_close(y, fake_quantized(linear, x), rtol=1e-5, atol=1e-5)


def test_a_strided_input_is_read_right() -> None:
    linear = plain_layer()
    x = torch.randn(64, 5, 7).permute(2, 1, 0)
    torch.testing.assert_close(int8_layer(linear)(x), fake_quantized(linear, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_16_bit_layer_rounds_input_weight_and_result(kind: torch.dtype) -> None:
    linear = plain_layer()
    x = torch.randn(20, 64)
    y = half_layer(linear, kind)(x)
    exact = x.to(kind).double() @ linear.weight.to(kind).double().t() + linear.bias.to(kind).double()
    assert y.dtype == torch.float32
    assert torch.equal(y.to(kind).float(), y), "the result is one of the type's numbers"
    assert float((y - exact).abs().max()) <= torch.finfo(kind).eps * float(exact.abs().max())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [int8_layer, half_layer])
def test_a_model_that_asks_for_the_type_of_the_weight_casts_nothing(make: MakeLayer, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    feed_forward = T5DenseActDense(T5Config(d_model=64, d_ff=96, dropout_rate=0.0)).to(kind)
    linear, x = plain_layer(96, 64, bias=False), torch.randn(3, 64).to(kind)
    expected = make(linear)(torch.relu(feed_forward.wi(x)))
    insert_sparse_(feed_forward, {"wo": make(linear)})
    assert feed_forward(x).dtype == kind
    assert torch.equal(feed_forward(x), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_type_of_the_input(kind: torch.dtype) -> None:
    linear = plain_layer()
    x = torch.randn(20, 64).to(kind)
    for sparse in (int8_layer(linear), half_layer(linear)):
        assert sparse(x).dtype == kind
    wanted = fake_quantized(linear, x.float())
    torch.testing.assert_close(int8_layer(linear)(x).float(), wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


class ScalesItself(Reference):
    """A reference that, like cuSPARSELt, multiplies by alpha and writes 16 bits; it counts its calls."""

    scales_to = CuSparseLt.scales_to
    asked: list[Epilogue] = []  # noqa: RUF012

    def multiply(self, plan: Plan, operand: Operand, x: Tensor, epilogue: Epilogue) -> Tensor:
        self.asked.append(epilogue)
        sums = super().multiply(plan, operand, x, epilogue)
        return sums if epilogue.alpha is None else (sums * epilogue.alpha).to(epilogue.dtype)


@pytest.fixture
def scaling() -> Iterator[ScalesItself]:
    ScalesItself.asked.clear()
    yield ScalesItself()
    ScalesItself.asked.clear()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_backend_that_scales_itself_gets_alpha_and_the_bias_comes_after(
    kind: torch.dtype, scaling: ScalesItself
) -> None:
    linear = plain_layer()
    x = torch.randn(20, 64).to(kind)
    y = int8_layer(linear, backend=scaling)(x)
    asked = scaling.asked[0]
    assert (asked.name, asked.dtype, asked.bias) == ("scale", kind, None)
    assert torch.equal(asked.alpha, AMAX / 127 * quantize_weight(linear.weight)[1])
    assert y.dtype == kind
    eps = torch.finfo(kind).eps
    torch.testing.assert_close(y.float(), fake_quantized(linear, x.float()), rtol=2 * eps, atol=2 * eps)
    int8_layer(linear, backend=scaling)(x.float())
    assert scaling.asked[1] == Epilogue("none", torch.int32), "float32 models get exact sums"


def test_layers_of_a_size_share_plans_and_types_do_not() -> None:
    backend = Reference()
    layers = [int8_layer(plain_layer(seed=seed), backend=backend) for seed in range(3)]
    for layer in layers:
        layer(torch.randn(5, 64))
    SparseLinear(pack(plain_layer().weight.half()), backend)(torch.randn(5, 64))
    assert (backend.plans.statistics.misses, backend.plans.statistics.hits) == (2, 2)


def test_casting_a_model_moves_a_layer_but_rounds_nothing() -> None:
    linear = plain_layer()
    sparse = int8_layer(linear)
    x = torch.randn(9, 64)
    wanted = sparse(x)
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16), nn.Module.float):
        cast(nn.Sequential(sparse))
        assert sparse.weight_scale is not None
        assert (sparse.values.dtype, sparse.weight_scale.dtype) == (torch.int8, torch.float32)
        assert torch.equal(sparse(x), wanted)
    assert sparse.to("meta").values.is_meta
    assert sparse.operands is None, "made for the device it was on"


def test_copies_and_state_dicts_compute_the_same() -> None:
    sparse = int8_layer(plain_layer())
    x = torch.randn(9, 64)
    wanted = sparse(x)
    twin = copy.deepcopy(sparse)
    assert torch.equal(twin(x), wanted)
    assert twin.backend.plans is not sparse.backend.plans
    other = int8_layer(plain_layer(seed=5), torch.tensor(9.0))
    assert not torch.equal(other(x), wanted)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), wanted), "what was prepared from the old weight is forgotten"


def test_autocast_rounds_no_sum() -> None:
    linear = plain_layer()
    x = torch.randn(20, 64)
    for sparse in (int8_layer(linear), half_layer(linear)):
        wanted = sparse(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sparse(x), wanted)


def test_nothing_has_a_gradient() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    for sparse in (int8_layer(plain_layer()), half_layer(plain_layer())):
        assert not sparse(x).requires_grad


def test_it_goes_into_a_model_and_out_again() -> None:
    model = nn.Sequential(nn.Sequential(plain_layer(64, 64), nn.GELU()), plain_layer()).eval()
    linears = {"0.0": model[0][0], "1": model[1]}
    x = torch.randn(2, 3, 64)
    insert_sparse_(model, {name: int8_layer(linear) for name, linear in linears.items()})
    assert [type(model.get_submodule(name)) for name in linears] == [SparseLinear, SparseLinear]
    assert not any(module.training for module in model.modules())
    wanted = fake_quantized(linears["1"], nn.functional.gelu(fake_quantized(linears["0.0"], x)))
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-3)
    remove_sparse_(model, linears)
    for name, linear in linears.items():
        back = model.get_submodule(name)
        assert type(back) is nn.Linear
        assert torch.equal(back.weight, fake_quantize_weight(linear.weight, linear.weight != 0))
        assert torch.equal(back.bias, linear.bias)
    with pytest.raises(TypeError, match="1 is a Linear, not a SparseLinear"):
        remove_sparse_(model, ["1"])


def test_parts_that_do_not_fit_are_refused() -> None:
    linear = plain_layer()
    integers, scale = quantize_weight(linear.weight)
    with pytest.raises(ValueError, match=r"weight of torch.int8 needs both scales"):
        SparseLinear(pack(integers), Reference())
    with pytest.raises(ValueError, match=r"weight of torch.float16 needs no scales"):
        SparseLinear(pack(linear.weight.half()), Reference(), Scales(AMAX, scale))
    with pytest.raises(ValueError, match=r"the bias \[64\] does not fit 96 outputs"):
        SparseLinear(pack(integers), Reference(), Scales(AMAX, scale), torch.zeros(64))
    with pytest.raises(ValueError, match=r"the weight scale \[1\] does not fit 96 outputs"):
        SparseLinear(pack(integers), Reference(), Scales(AMAX, scale[:1]))
