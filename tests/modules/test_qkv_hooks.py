"""Hooks on q, k and v of one block as their linears put them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqat.distillation.minilm_v1 import MiniLMv1
from sqat.models.attention import attention_heads, hook_last_qkv, use_hooked_attention
from sqat.models.layer_selection import encoder_blocks, find_qkv
from sqat.modules.activation_quantizers import Quantizers, insert_quantizers_, remove_quantizers_
from sqat.modules.hooks import hook_attention
from sqat.modules.qkv_hooks import QkvHooks
from tests.errors import raises_code

MakeModel = Callable[..., PreTrainedModel]


def test_q_k_and_v_are_the_outputs_of_their_linears(
    family: str, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model(family)
    names = find_qkv(model)
    read: list[Tensor] = []
    handle = model.get_submodule(names[0]).register_forward_pre_hook(lambda m, args: read.append(args[0]))
    hooks = QkvHooks(model, names, attention_heads(model, names[0]))
    with torch.no_grad():
        model(**batch)
        got = hooks.pop(3, 12)
        weights = torch.cat([model.get_submodule(name).weight for name in names])
        biases = [model.get_submodule(name).bias for name in names]
        wanted = torch.cat([read[0] @ part.T for part in weights.split(32)], -1)
        wanted = wanted if biases[0] is None else wanted + torch.cat(biases)
    handle.remove()
    torch.testing.assert_close(torch.cat([got.query, got.key, got.value], -1), wanted)
    assert got.heads == 2
    with raises_code("unsupported-model"):
        hooks.pop(3, 12)
    hooks.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_reach_the_linears(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    student, teacher = make_model("bert"), make_model("bert", hidden_size=48)
    catch = [hook_last_qkv(m) for m in (student, teacher)]
    student(**batch)
    with torch.no_grad():
        teacher(**batch)
    MiniLMv1()(catch[0].pop(3, 12), catch[1].pop(3, 12), batch["attention_mask"]).backward()
    touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    last = "bert.encoder.layer.1.attention.self"
    assert {f"{last}.{part}.weight" for part in ("query", "key", "value")} <= touched
    assert "bert.encoder.layer.0.output.dense.weight" in touched
    assert not {name for name in touched if "layer.1.output" in name or "classifier" in name}


def test_hooks_see_q_k_v_before_their_quantizers(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert")
    use_hooked_attention(model)
    own = "bert.encoder.layer.1.attention.self"
    sites = [f"{own}:{part}" for part in ("query", "key", "value")]
    coarse = Quantizers(dict.fromkeys(sites, torch.tensor(0.01)), {site: site for site in sites})
    hooks = QkvHooks(model, find_qkv(model), 2)
    with torch.no_grad():
        logits = model(**batch).logits
        plain = hooks.pop(3, 12)
        inserted = insert_quantizers_(model, coarse, encoder_blocks(model))
        assert not torch.equal(model(**batch).logits, logits)
        caught = hooks.pop(3, 12)
    remove_quantizers_(model, inserted)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], caught[:3], strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_shared_keys_and_values_are_repeated_for_each_head(
    family: str, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    """Four query heads on two of keys and values; values reach the products as they left their linear."""
    model = make_model(family)
    use_hooked_attention(model)
    own, seen = "model.layers.1.self_attn", {}
    hooks = hook_attention(model, lambda site, x: seen.setdefault(site, x), [own])
    hooks = hook_last_qkv(model)
    with torch.no_grad():
        model(**batch)
    caught, blank = hooks.pop(3, 12), hooks.zeros(3)
    hooks.remove()
    hooks.remove()
    assert torch.equal(caught.value, seen[f"{own}:value"].transpose(1, 2).flatten(2))
    assert caught.heads == 4
    assert caught.causal
    assert [x.shape[-1] for x in (*caught[:3], *blank[:3])] == [32] * 6


def test_keys_are_repeated_like_values(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("llama")
    hooks = hook_last_qkv(model)
    own: list[Tensor] = []
    handle = model.get_submodule("model.layers.1.self_attn.k_proj").register_forward_hook(lambda *a: own.append(a[2]))
    with torch.no_grad():
        model(**batch)
    first, second = own[0].split(8, -1)
    assert torch.equal(hooks.pop(3, 12).key, torch.cat([first, first, second, second], -1))
    hooks.remove()
    handle.remove()


def test_an_encoder_is_not_causal(family: str, make_model: MakeModel) -> None:
    assert not hook_last_qkv(make_model(family)).causal


def test_a_fused_linear_is_split_by_heads() -> None:
    model = nn.Sequential(nn.Linear(8, 32, bias=False))
    hooks = QkvHooks(model, ["0"], 4, 2)
    x = torch.randn(1, 3, 8)
    whole = model(x)
    caught = hooks.pop(1, 3)
    assert torch.equal(caught.query, whole[..., :16])
    assert torch.equal(caught.value[..., 4:8], whole[..., 24:28])
    with raises_code("unsupported-model"):
        QkvHooks(model, ["0"], 3)
