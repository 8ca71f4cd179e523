"""Capture: q, k and v of one block as their linears put them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqat.distillation.minilm import MiniLMv1
from sqat.insertion.capture import Capture
from sqat.insertion.quantizers import Quantizers, insert_quantizers_, remove_quantizers_
from sqat.layers import encoder_blocks, find_qkv
from sqat.models import attention_heads, use_taps

MakeModel = Callable[..., PreTrainedModel]


def test_q_k_and_v_are_the_outputs_of_their_linears(
    family: str, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model(family)
    names = find_qkv(model)
    read: list[Tensor] = []
    handle = model.get_submodule(names[0]).register_forward_pre_hook(lambda m, args: read.append(args[0]))
    capture = Capture(model, names, attention_heads(model))
    with torch.no_grad():
        model(**batch)
        got = capture.take()
        weights = torch.cat([model.get_submodule(name).weight for name in names])
        biases = [model.get_submodule(name).bias for name in names]
        wanted = torch.cat([read[0] @ part.T for part in weights.split(32)], -1)
        wanted = wanted if biases[0] is None else wanted + torch.cat(biases)
    handle.remove()
    torch.testing.assert_close(torch.cat([got.query, got.key, got.value], -1), wanted)
    assert got.heads == 2
    with pytest.raises(KeyError):
        capture.take()
    capture.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_reach_the_linears(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    student, teacher = make_model("bert"), make_model("bert", hidden_size=48)
    catch = [Capture(m, find_qkv(m), attention_heads(m)) for m in (student, teacher)]
    student(**batch)
    with torch.no_grad():
        teacher(**batch)
    MiniLMv1()(catch[0].take(), catch[1].take(), batch["attention_mask"]).backward()
    touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    last = "bert.encoder.layer.1.attention.self"
    assert {f"{last}.{part}.weight" for part in ("query", "key", "value")} <= touched
    assert "bert.encoder.layer.0.output.dense.weight" in touched
    assert not {name for name in touched if "layer.1.output" in name or "classifier" in name}


def test_the_products_quantizers_come_later(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert")
    use_taps(model)
    own = "bert.encoder.layer.1.attention.self"
    sites = [f"{own}:{part}" for part in ("query", "key", "value")]
    coarse = Quantizers(dict.fromkeys(sites, torch.tensor(0.01)), {site: site for site in sites})
    capture = Capture(model, find_qkv(model), 2)
    with torch.no_grad():
        logits = model(**batch).logits
        plain = capture.take()
        inserted = insert_quantizers_(model, coarse, encoder_blocks(model))
        assert not torch.equal(model(**batch).logits, logits)
        caught = capture.take()
    remove_quantizers_(model, inserted)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], caught[:3], strict=True))
