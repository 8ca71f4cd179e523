"""Placement cpu in torch: attention of bytes, the narrow range, GELU's polynomial, against loops and the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertSelfAttention

from sqat.export.cpu.encoder import ACTIVATIONS, FAMILIES, check_encoder
from sqat.export.cpu.packing import pack_dense
from sqat.models.attention import use_hooked_attention
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_, remove_quantizers_
from sqat.modules.attention import byte_attention, byte_weights, hooked_attention
from sqat.modules.served_arithmetic import ERF, POLYNOMIALS, TANH
from sqat.modules.site_discovery import discover_sites
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers
from tests.errors import raises_code
from tests.export.cpu_models import by_kernels
from tests.export.cpu_oracle import gelu, kernel_polynomial

MakeModel = Callable[..., Any]
LOWEST = torch.finfo(torch.float32).min


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
    """Attention of bytes, one query at a time, in float64; the masked keys are not there at all."""
    batch, heads, tokens, width = query.shape
    out = torch.zeros(batch, tokens, heads, width, dtype=torch.float64)
    for b, h, t in np.ndindex(batch, heads, tokens):
        keys, values = key[b, h, kept[b]].double(), value[b, h, kept[b]].double()
        if not len(keys):
            continue
        scores = keys @ query[b, h, t].double() / math.sqrt(width)
        weights = [round(255 * math.exp(score - float(scores.max()))) for score in scores.tolist()]
        out[b, t, h] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out


def test_byte_attention_equals_the_loop() -> None:
    query, key, value = (drawn(3, 2, 7, 8, seed=seed) for seed in (1, 2, 3))
    kept = torch.arange(7) < torch.tensor([7, 3, 0])[:, None]
    mask = torch.zeros(3, 1, 1, 7).masked_fill(~kept[:, None, None], LOWEST)
    got, shares = byte_attention(nn.Module().eval(), query, key, value, mask)
    torch.testing.assert_close(got.double(), attended(query, key, value, kept), rtol=0, atol=1e-6)
    assert shares.sum(-1)[:2] == pytest.approx(1)
    assert not shares[1, :, :, 3:].any()
    assert not got[2].any(), "no key, no value"
    unmasked, _ = byte_attention(BertSelfAttention(BertConfig()).eval(), query, key, value, None)
    assert torch.equal(unmasked[0], got[0])


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias", "head_mask", "made_up"])
def test_byte_attention_refuses_an_argument_that_it_does_not_compute(argument: str) -> None:
    query, key, value = (drawn(1, 2, 3, 8, seed=seed) for seed in (1, 2, 3))
    module = nn.Module().eval()
    with raises_code("unsupported-model", match=f"Module gets {argument}"):
        byte_attention(module, query, key, value, None, **{argument: torch.zeros(1)})
    with raises_code("unsupported-model", match="shares keys"):
        byte_attention(module, query, key[:, :1], value[:, :1], None)
    wanted, _ = byte_attention(module, query, key, value, None)
    others = {argument: None, "is_causal": True, "output_attentions": True, "cu_seq_lens_q": torch.zeros(1)}
    assert torch.equal(byte_attention(module, query, key, value, None, **others)[0], wanted)


def test_the_gradient_of_byte_attention_is_that_of_softmax_up_to_rounding() -> None:
    query, key, value = (drawn(2, 2, 6, 8, seed=seed).requires_grad_() for seed in (1, 2, 3))
    direction = drawn(2, 6, 2, 8, seed=4)
    grads = []
    for attention in (byte_attention, hooked_attention):
        out, _ = attention(BertSelfAttention(BertConfig()).eval(), query, key, value, None)
        grads.append(torch.autograd.grad((out * direction).sum(), (query, key, value)))
    for ours, smooth in zip(*grads, strict=True):
        assert float((ours - smooth).norm() / smooth.norm()) < 0.01


def test_byte_weights_pass_gradients_straight_through() -> None:
    scores = drawn(3, 5).requires_grad_()
    direction = drawn(3, 5, seed=1)
    (ours,) = torch.autograd.grad((byte_weights(scores, None) * direction).sum(), scores)
    largest = scores.detach().amax(-1, keepdim=True)
    assert torch.allclose(ours, 255 * (scores - largest).exp().detach() * direction)


@pytest.mark.parametrize("learned", [False, True])
def test_the_narrow_range_ends_at_minus_127(learned: bool) -> None:
    amax = {"a": torch.tensor(1.27)}
    x = torch.tensor([[-2.0, -1.28, -1.27, 0.014, 1.27, 2.0]]).requires_grad_()
    narrow, wide = (Quantizers(amax, {"a": "a"}, learned, kernels=kernels) for kernels in (True, False))
    assert (narrow("a", x) * 100).round().tolist() == [[-127, -127, -127, 1, 127, 127]]
    assert (wide("a", x) * 100).round().tolist() == [[-128, -128, -127, 1, 127, 127]]
    (gradient,) = torch.autograd.grad(narrow("a", x).sum(), x)
    assert gradient[0, [0, 1, 3, 5]].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(("name", "polynomial"), [("gelu", ERF), ("gelu_tanh", TANH)])
def test_the_polynomials_are_the_kernels(name: str, polynomial: Any) -> None:
    assert (list(polynomial.coefficients), polynomial.limit) == kernel_polynomial(name)
    x = torch.linspace(-8, 8, 20001)
    assert polynomial.gelu(x).numpy() == pytest.approx(gelu(x.numpy(), name), abs=6e-5)


@pytest.mark.parametrize(("name", "polynomial"), [("gelu", ERF), ("gelu_tanh", TANH)])
def test_the_kernels_compute_the_same_bits(name: str, polynomial: Any, tmp_path: Path) -> None:
    """A `Linear` whose channel c is input c times a scale of its own: 16 functions of a byte."""
    x = np.arange(1, 256, dtype=np.uint8).repeat(16).reshape(255, 16)
    scale = np.linspace(0.001, 0.06, 16, dtype=np.float32)
    bias = np.linspace(-0.01, 0.01, 16, dtype=np.float32)
    parts = {"values": pack_dense(np.eye(16, dtype=np.int8)).values, "scale": scale, "bias": bias}
    stored = [onnx.numpy_helper.from_array(array, key) for key, array in parts.items()]
    node = onnx.helper.make_node("Linear", ["x", "values", "", "scale", "bias"], ["y"], domain="sqat", activation=name)
    ends = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape),
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, x.shape)]  # fmt: skip
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], stored)
    domains = [onnx.helper.make_opsetid(*entry) for entry in (("", 20), ("sqat", 1))]
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "one.onnx")
    (got,) = by_kernels(tmp_path / "one.onnx", {"x": torch.from_numpy(x)})
    product = torch.from_numpy((x.astype(np.float32) - 128) * scale + bias)
    assert np.array_equal(got, polynomial.gelu(product).numpy())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_function_has_its_kernel(name: str) -> None:
    x = torch.linspace(-8, 8, 2001)
    theirs = ACT2FN[name](x).numpy()
    if ACTIVATIONS[name] == "relu":
        assert np.array_equal(theirs, np.maximum(x.numpy(), 0))
        return
    assert POLYNOMIALS[type(ACT2FN[name]).__name__].gelu(x).numpy() == pytest.approx(theirs, abs=6e-5)
    assert gelu(x.numpy(), ACTIVATIONS[name]) == pytest.approx(theirs, abs=1e-6)


def test_the_polynomial_is_used_in_eval_mode_and_goes_with_the_quantizers(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    seen: list[Tensor] = []
    activation = model.bert.encoder.layer[0].intermediate.intermediate_act_fn
    activation.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        plain = model(**batch).logits
        insertion = insert_quantizers_(model, Quantizers({}, {}, kernels=True), encoder_blocks(model))
        seen.clear()
        activation._forward_hooks.move_to_end(next(iter(activation._forward_hooks)))  # ours sees what comes out
        model(**batch)
        assert torch.equal(seen[1], ERF.gelu(seen[0]))
        model.train()(**batch)
        assert torch.equal(seen[3], nn.functional.gelu(seen[2]))
        remove_quantizers_(model.eval(), insertion)
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_sites_are_inputs_of_linears_and_q_k_v(family: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model(family)
    use_hooked_attention(model, "cpu")
    linears = choose_layers(model, Layers(), "quantize").chosen
    sites = discover_sites(model, batch, linears, encoder_blocks(model), PLACEMENTS["cpu"])
    roles = [site.role for site in sites.shared_with]
    assert roles.count("input") == len(linears) == 12
    assert sorted({*roles}) == ["input", "key", "query", "value"]
    assert [roles.count(part) for part in ("query", "key", "value")] == [2, 2, 2]
    assert sites.shared_amax_groups == [], "the fused linear has a scale per channel"
    assert len(set(sites.shared_with.values())) == 8 + 6


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_parts_of_every_family_are_where_the_table_says(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    family = check_encoder(model)
    names = dict(model.named_modules())
    (first, *_), *_ = [encoder_blocks(model)]
    assert first.endswith(f"{family.stack}.0")
    assert all(isinstance(names[f"{first}.{name}"], nn.Linear) for name in family.linears)
    assert all(isinstance(names[f"{first}.{name}"], nn.LayerNorm) for name in (family.first_norm, family.second_norm))
    embeddings = f"{first.removesuffix(f'{family.stack}.0')}embeddings"
    assert isinstance(names[f"{embeddings}.LayerNorm"], nn.LayerNorm)
    assert family.has_types == (f"{embeddings}.token_type_embeddings" in names)
    assert family.counts_positions == (names[f"{embeddings}.position_embeddings"].padding_idx is not None)
