"""What placement cpu computes in eval mode, against loops in float64 and integers; the kernels themselves are compared
in tests/export/test_cpu_sparse.py, a whole encoder bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sqat.errors import SqatError
from sqat.models.attention import use_hooked_attention
from sqat.models.layer_selection import encoder_blocks
from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_, remove_quantizers_
from sqat.modules.parametrize import insert_weights_, remove_weights_
from sqat.modules.served_arithmetic import (
    EXACT,
    attend_as_kernels,
    mask_weight,
    multiply_as_kernels,
    multiply_exactly,
    normalize_as_kernels,
    power_of_two,
    sum_rows,
)

LOWEST = torch.finfo(torch.float32).min


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("inputs", [3, 1040, 1041, 4000])
def test_products_are_integers_rounded_once(inputs: int) -> None:
    left, right = whole(5, inputs), whole(inputs, 7, seed=1)
    left[0], right[:, 0] = 127, 127  # the largest sum there can be
    wanted = (left.long() @ right.long()).numpy()
    assert inputs < 1041 or wanted.max() > EXACT
    assert np.array_equal(multiply_exactly(left, right).numpy(), wanted.astype(np.float32))


@pytest.mark.parametrize("inputs", [48, 1041])
def test_products_are_exact_under_autocast_too(inputs: int) -> None:
    left, right = whole(5, inputs), whole(inputs, 7, seed=1)
    plain = multiply_exactly(left, right)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = multiply_exactly(left, right)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_of_a_narrow_type_hides_the_same_keys(dtype: torch.dtype) -> None:
    q, k, v = (whole(1, 2, 7, 8, seed=seed) * 0.02 for seed in (1, 2, 3))
    for lowest in (torch.finfo(dtype).min, -torch.inf):
        masks = [torch.zeros(1, 1, 1, 7, dtype=kind) for kind in (torch.float32, dtype)]
        for mask in masks:
            mask[..., 4:] = lowest if mask.dtype == dtype else LOWEST
        wide, narrow = (attend_as_kernels(q, k, v, mask, 0.5, lambda role: torch.tensor(0.02))[1] for mask in masks)
        assert torch.equal(narrow, wide)
        assert not narrow[..., 4:].any()


def test_a_model_that_is_not_float32_is_refused_unchanged(make_model: Callable[..., Any]) -> None:
    model = make_model("bert").bfloat16()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SqatError) as error:
        insert_quantizers_(model, Quantizers({}, {}, kernels=True), encoder_blocks(model))
    assert error.value.code == "unsupported-model"
    assert [name for name, _ in model.named_modules()] == before


def test_the_power_is_255_times_that_of_two() -> None:
    x = -torch.cat([torch.linspace(0, 42, 10001), torch.arange(0, 41).float(), torch.tensor([0.5, 1e9])])
    wanted = 255 * np.exp2(x.double().numpy().clip(min=-40))
    assert power_of_two(x).numpy() == pytest.approx(wanted, rel=1e-6)
    assert float(power_of_two(torch.zeros(1))) == 255


@pytest.mark.parametrize("channels", [1, 15, 16, 40, 384])
def test_rows_are_summed_in_sixteen_parts(channels: int) -> None:
    x = drawn(3, channels)
    for row, got in zip(x.numpy(), sum_rows(x)[:, 0].numpy(), strict=True):
        parts = [np.float32(0)] * 16
        for channel, value in enumerate(row):
            parts[channel % 16] += value
        for half in (8, 4, 2, 1):
            parts = [parts[i] + parts[i + half] for i in range(half)]
        assert got == parts[0]


def test_the_norm_is_a_layer_norm() -> None:
    norm = nn.LayerNorm(40, eps=1e-5)
    norm.weight.data, norm.bias.data = drawn(40) + 1, drawn(40, seed=1)
    x = drawn(6, 7, 40, seed=2) * 3 + 1
    wanted = nn.functional.layer_norm(x.double(), (40,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert torch.allclose(normalize_as_kernels(norm, x).double(), wanted, atol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_a_linear_is_an_integer_product(pruned: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(48, 8, bias=bias))
    module, step = model[0], torch.tensor(0.03)
    assert isinstance(module, nn.Linear)
    plain = module.weight.detach().clone()
    mask = drawn(8, 48, seed=3) > 0 if pruned else torch.ones(8, 48, dtype=torch.bool)
    transforms = insert_weights_(model, {"0": mask} if pruned else {}, ["0"])
    integers = whole(5, 48)
    with torch.no_grad():
        got = multiply_as_kernels(lambda: step, module, integers * step).numpy()
        assert torch.equal(mask_weight(module), plain * mask)
        remove_weights_(model, transforms)
        assert torch.equal(mask_weight(module), plain * mask)
    kept = (plain * mask).numpy()
    scale = np.abs(kept).max(1) / np.float32(127)
    sums = integers.long().numpy() @ np.rint(kept * (np.float32(1) / scale)[:, None]).astype(np.int64).T
    wanted = sums.astype(np.float32) * (scale * np.float32(0.03))
    assert np.array_equal(got, wanted if module.bias is None else wanted + module.bias.detach().numpy())


def test_attention_is_the_loop_over_the_kept_keys() -> None:
    steps = {"query": torch.tensor(0.02), "key": torch.tensor(0.03), "value": torch.tensor(0.011)}
    q, k, v = (whole(3, 2, 7, 8, seed=seed) for seed in (1, 2, 3))
    kept = torch.arange(7) < torch.tensor([7, 3, 0])[:, None]
    mask = torch.zeros(3, 1, 1, 7).masked_fill(~kept[:, None, None], LOWEST)
    scaling = 8**-0.5
    got, shares = attend_as_kernels(
        q * steps["query"], k * steps["key"], v * steps["value"], mask, scaling, steps.__getitem__
    )
    for b, h, t in np.ndindex(3, 2, 7):
        if not kept[b].any():
            assert not got[b, t, h].any()
            continue
        scores = (k[b, h, kept[b]].long() @ q[b, h, t].long()).tolist()
        exponents = [(score - max(scores)) * 0.02 * 0.03 * scaling for score in scores]
        bytes_ = torch.tensor([round(255 * math.exp(exponent)) for exponent in exponents])
        wanted = (bytes_ @ v[b, h, kept[b]].long()) / bytes_.sum() * 0.011
        assert torch.allclose(got[b, t, h], wanted, rtol=1e-5, atol=1e-6)
        assert torch.allclose(shares[b, h, t, kept[b]], bytes_ / bytes_.sum())
    unmasked, _ = attend_as_kernels(
        q * steps["query"], k * steps["key"], v * steps["value"], None, scaling, steps.__getitem__
    )
    assert torch.equal(unmasked[0], got[0])


def test_training_mode_is_unchanged_and_removal_restores_the_model(
    make_model: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    query = "bert.encoder.layer.0.attention.self.query"
    amax = {f"{query}:input": torch.tensor(3.0)}
    module = model.get_submodule(query)
    own = module.forward = module.forward
    norm = model.bert.encoder.layer[0].output.LayerNorm
    use_hooked_attention(model, "cpu")
    with torch.no_grad():
        before = model.eval()(**batch).logits
        insertion = insert_quantizers_(
            model, Quantizers(amax, {site: site for site in amax}, kernels=True), encoder_blocks(model)
        )
        x = drawn(2, 3, module.in_features)
        quantized = insertion.quantizers(f"{query}:input", x)
        insertion.quantizers.forget()
        model.train()
        assert torch.equal(module(x), nn.functional.linear(quantized, module.weight, module.bias))
        assert torch.equal(norm(x), nn.functional.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps))
        model.eval()
        served = multiply_as_kernels(lambda: torch.tensor(3.0) / 127, module, quantized)
        assert torch.equal(module(x), served)
        assert torch.equal(norm(x), normalize_as_kernels(norm, x))
        remove_quantizers_(model, insertion)
        assert torch.equal(model(**batch).logits, before)
    assert vars(module)["forward"] is own, "one that the user had put there"
    assert "forward" not in vars(norm)
