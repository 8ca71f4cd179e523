"""Fake quantization against torch's own ops and, for learned scales, against a float64 loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqat.quantization.fake_quant import (
    check_amax,
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_weight,
    quantize_weight,
    sqnr_db,
)
from sqat.runtime import kernels

ZERO_POINT = torch.tensor(0, dtype=torch.int32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def torch_activation(x: Tensor, amax: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, amax / 127, ZERO_POINT, -128, 127)


def gradient_of(function, x: Tensor, *args: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    function(x, *args).backward(drawn(*x.shape, seed=99).to(x.dtype))
    assert x.grad is not None
    return x.grad


@settings(deadline=None)
@given(st.floats(2.0**-30, 2.0**30, width=32), st.integers(0, 9))
def test_activations_equal_torchs_bit_for_bit(value, seed):
    amax = torch.tensor(value)
    x = drawn(500, seed=seed).mul(value * 0.7)
    ours, theirs = fake_quantize(x, amax), torch_activation(x, amax)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[ours != 0].view(torch.int32), theirs[theirs != 0].view(torch.int32))
    steps = x.double() * 127 / value
    no_tie = ((steps - 127.5).abs() > 1e-3) & ((steps + 128.5).abs() > 1e-3)
    gradient, expected = gradient_of(fake_quantize, x, amax), gradient_of(torch_activation, x, amax)
    assert torch.equal(gradient[no_tie], expected[no_tie])


@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(0, 9))
def test_the_narrow_range_equals_torchs(value, seed):
    amax, x = torch.tensor(value), drawn(500, seed=seed).mul(value * 0.7)

    def narrow(x: Tensor, amax: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, amax / 127, ZERO_POINT, -127, 127)

    assert torch.equal(fake_quantize(x, amax, -127), narrow(x, amax))
    no_tie = ((x.double() * 127 / value).abs() - 127.5).abs() > 1e-3
    ours = gradient_of(lambda x, amax: fake_quantize(x, amax, -127), x, amax)
    assert torch.equal(ours[no_tie], gradient_of(narrow, x, amax)[no_tie])


def test_gradient_ends_half_a_step_beyond_the_range_as_in_torch():
    amax = torch.tensor(127.0)
    x = torch.tensor([-129.0, -128.6, -128.4, -128.0, 0.0, 126.5, 127.0, 127.4, 127.6, 1e30, -1e30])
    inside = [False, False, True, True, True, True, True, True, False, False, False]
    ours = gradient_of(fake_quantize, x, amax)
    assert (ours != 0).tolist() == inside
    assert torch.equal(ours, gradient_of(torch_activation, x, amax))


def test_ties_round_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert fake_quantize(x, torch.tensor(127.0)).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, amax = drawn(1000).mul(2).to(dtype), torch.tensor(1.7)
    y = fake_quantize(x, amax)
    assert y.dtype == dtype
    assert torch.equal(y, torch_activation(x.float(), amax).to(dtype))
    gradient = gradient_of(fake_quantize, x, amax)
    assert gradient.dtype == dtype
    inside = gradient_of(torch_activation, x.float(), amax) != 0
    assert torch.equal(gradient, drawn(1000, seed=99).to(dtype) * inside)


def test_autocast_changes_nothing():
    x, amax = drawn(100), torch.tensor(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quantize(x, amax), torch_activation(x, amax))


def test_only_the_input_is_saved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)  # a kernel keeps less: see test_kernels
    saved: list[Tensor] = []
    x = drawn(4, 8).requires_grad_()
    mask = drawn(4, 8) > 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, torch.tensor(1.0))
        fake_quantize_weight(x, mask)
        fake_quantize_weight(x, None)
    big = [t for t in saved if t.numel() > 1]
    assert [t.dtype for t in big] == [torch.float32, torch.bool]
    assert big[0].data_ptr() == x.data_ptr()


def test_strides_do_not_matter():
    x, amax = drawn(6, 8, 4).transpose(0, 2), torch.tensor(1.0)
    assert torch.equal(fake_quantize(x, amax), fake_quantize(x.contiguous(), amax))
    assert torch.equal(gradient_of(fake_quantize, x, amax), gradient_of(torch_activation, x, amax))


def test_nan_is_not_hidden():
    assert fake_quantize(torch.tensor([math.nan, 1.0]), torch.tensor(1.0)).isnan().tolist() == [True, False]


def learned_by_loop(x: list[float], grad: list[float], amax: float, values: int) -> tuple[list[float], float]:
    scale, grad_x, grad_scale = amax / 127, [], 0.0
    for value, g in zip(x, grad, strict=True):
        v = value / scale
        if -128 < v < 127:
            grad_x.append(g)
            grad_scale += g * (round(v) - v)
        else:
            grad_x.append(0.0)
            grad_scale += g * (-128 if v <= -128 else 127)
    return grad_x, grad_scale / math.sqrt(values * 127) / 127  # amax = 127 scale


@pytest.mark.parametrize("value", [0.5, 1.0, 3.0])
def test_learned_gradients_are_those_of_the_paper(value):
    x, amax = drawn(3, 40).requires_grad_(), torch.tensor(value, requires_grad=True)
    grad = drawn(3, 40, seed=1)
    y = fake_quantize_learned(x, amax)
    assert torch.equal(y, torch_activation(x.detach(), torch.tensor(value)))
    y.backward(grad)
    expected_x, expected_amax = learned_by_loop(x.flatten().tolist(), grad.flatten().tolist(), value, values=40)
    assert x.grad is not None
    assert amax.grad is not None
    assert torch.equal(x.grad.flatten(), torch.tensor(expected_x))
    assert amax.grad.item() == pytest.approx(expected_amax, rel=1e-4)
    assert amax.grad.shape == amax.shape


@pytest.mark.parametrize(("start", "rate"), [(0.3, 0.03), (30.0, 0.3)])
def test_learning_amax_lowers_the_error(start, rate):
    x, amax = drawn(8, 500), torch.tensor(start, requires_grad=True)
    before = sqnr_db(x, fake_quantize(x, amax.detach()))
    optimizer = torch.optim.Adam([amax], lr=rate)
    for _ in range(150):
        optimizer.zero_grad()
        (fake_quantize_learned(x, amax) - x).square().mean().backward()
        optimizer.step()
    assert sqnr_db(x, fake_quantize(x, amax.detach())) > before + 10


def test_a_learned_amax_recovers_from_zero():
    x, amax = drawn(8, 50), torch.tensor(-1.0, requires_grad=True)
    y = fake_quantize_learned(x, amax)
    (y - x).square().mean().backward()
    assert y.isfinite().all()
    assert amax.grad is not None
    assert amax.grad < 0  # descent raises it


def test_learned_amax_works_in_bfloat16():
    x, amax = drawn(3, 40).bfloat16().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    y = fake_quantize_learned(x, amax)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert amax.grad is not None
    assert amax.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(12, 40), (12, 8, 3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_torchs_per_channel(shape, seed):
    weight, mask = drawn(*shape, seed=seed), drawn(*shape, seed=seed + 10) > 0
    masked = weight * mask
    scale = masked.flatten(1).abs().amax(1) / 127
    zero_points = torch.zeros(12, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(masked, scale, zero_points, 0, -127, 127)
    assert torch.equal(fake_quantize_weight(weight, mask), expected)
    grad = drawn(*shape, seed=99)
    assert torch.equal(gradient_of(fake_quantize_weight, weight, mask), grad * mask)
    assert torch.equal(gradient_of(lambda w: fake_quantize_weight(w, None), weight), grad)


def test_pruned_weights_are_positive_zero():
    weight = -drawn(16, 64).abs()
    mask = drawn(16, 64, seed=1) > 0
    y = fake_quantize_weight(weight, mask)
    assert not y[~mask].any()
    assert not y[y == 0].signbit().any()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_integers_times_scales_are_the_fake_weights(masked, seed):
    weight = drawn(32, 64, seed=seed).mul(drawn(32, 1, seed=seed + 20).exp())
    mask = drawn(32, 64, seed=seed + 10) > 0 if masked else None
    weight_in_file = weight if mask is None else torch.where(mask, weight, 0.0)
    integers, scale = quantize_weight(weight_in_file)
    dequantized = integers.float() * scale[:, None]
    fake = fake_quantize_weight(weight, mask)
    assert torch.equal(dequantized.view(torch.int32), fake.view(torch.int32))
    assert integers.dtype == torch.int8
    assert scale.shape == (32,)
    assert integers.flatten(1).abs().amax(1).eq(127).all()
    if mask is not None:
        assert not integers[~mask].any()


def test_a_fully_pruned_row_has_a_positive_scale():
    weight, mask = drawn(3, 8), torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    integers, scale = quantize_weight(torch.where(mask, weight, 0.0))
    assert (scale > 0).all()
    assert (1 / scale).isfinite().all()
    assert not integers[1].any()
    assert fake_quantize_weight(weight, mask)[1].tolist() == [0.0] * 8
    assert gradient_of(fake_quantize_weight, weight, mask).isfinite().all()


def test_inputs_do_not_change():
    weight, mask, x = drawn(4, 8), drawn(4, 8) > 0, drawn(5)
    before = weight.clone(), mask.clone(), x.clone()
    fake_quantize_weight(weight, mask)
    fake_quantize_weight(weight, None)
    quantize_weight(weight)
    fake_quantize(x, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip((weight, mask, x), before, strict=True))


def test_weights_in_bfloat16_are_computed_in_float32():
    weight, mask = drawn(8, 16).bfloat16(), drawn(8, 16, seed=1) > 0
    y = fake_quantize_weight(weight, mask)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fake_quantize_weight(weight.float(), mask).bfloat16())


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(4, 8\)"):
        fake_quantize_weight(drawn(4, 8), torch.ones(4, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("amax", "words"),
    [
        (torch.tensor(0.0), "positive and finite, got 0.0"),
        (torch.tensor(-1.0), "positive and finite, got -1.0"),
        (torch.tensor(math.nan), "positive and finite, got nan"),
        (torch.tensor(math.inf), "positive and finite, got inf"),
        (torch.tensor([1.0]), r"0-d float tensor, got torch.float32 \(1,\)"),
        (torch.tensor(1), "0-d float tensor, got torch.int64"),
    ],
)
def test_bad_amax_is_refused(amax, words):
    with pytest.raises(ValueError, match=f"^encoder.0:input: must be .*{words}"):
        check_amax(amax, "encoder.0:input")


def test_sqnr_is_the_ratio_in_decibel():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    x = drawn(1000)
    assert 35 < sqnr_db(x, fake_quantize(x, x.abs().max())) < 45  # 6 dB a bit, less the head room
