"""Fake quantizers in a model, against the same model written out by hand with torch's own fake-quantize ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sqat.models.attention import use_eager, use_hooked_attention
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.modules import activation_quantizers as module
from sqat.modules.activation_quantizers import (
    QUANTIZERS,
    Quantizers,
    fake_quantized_,
    insert_quantizers_,
    remove_quantizers_,
)
from sqat.modules.hooks import hook_sites
from sqat.modules.site_discovery import discover_sites
from sqat.modules.sites import Sites
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import parse_pattern

MakeModel = Callable[..., PreTrainedModel]
Setup = tuple[PreTrainedModel, Sites, dict[str, Tensor], dict[str, Tensor], list[str]]


def fake(x: Tensor, amax: Tensor) -> Tensor:
    zero = torch.tensor(0, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, amax / 127, zero, -128, 127)


def fake_weight(weight: Tensor, mask: Tensor) -> Tensor:
    weight = weight * mask
    scale = weight.detach().abs().amax(1).clamp(min=2.0**-40) / 127
    return torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros(len(scale), dtype=torch.int32), 0, -127, 127
    )


def written_out(model: Any, batch: dict[str, Tensor], setup: Setup) -> Tensor:
    """A BERT classifier in eval mode, every product and quantizer spelled out; no code of the package runs."""
    _, sites, amax, masks, _ = setup

    def q(site: str, x: Tensor) -> Tensor:
        return fake(x, amax[sites.shared_with[site]]) if site in sites.shared_with else x

    def linear(name: str, x: Tensor) -> Tensor:
        layer = model.get_submodule(name)
        return q(f"{name}:output", F.linear(x, fake_weight(layer.weight, masks[name]), layer.bias))

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 16).transpose(1, 2)

    x = model.bert.embeddings(batch["input_ids"])
    padding = torch.zeros(batch["attention_mask"].shape).masked_fill(
        batch["attention_mask"] == 0, torch.finfo(torch.float32).min
    )[:, None, None]
    for index, block in enumerate(model.bert.encoder.layer):
        name = f"bert.encoder.layer.{index}"
        attention, own = f"{name}.attention", f"{name}.attention.self"
        x = q(f"{own}.query:input", x)
        query, key, value = (
            q(f"{own}:{part}", heads(linear(f"{own}.{part}", x))) for part in ("query", "key", "value")
        )
        softmax = q(f"{own}:softmax", (query @ key.transpose(2, 3) * 0.25 + padding).softmax(-1))
        context = q(f"{attention}.output.dense:input", (softmax @ value).transpose(1, 2).reshape(x.shape))
        x = block.attention.output.LayerNorm(linear(f"{attention}.output.dense", context) + x)
        x = q(f"{name}.intermediate.dense:input", x)
        hidden = q(f"{name}.output.dense:input", F.gelu(linear(f"{name}.intermediate.dense", x)))
        x = block.output.LayerNorm(linear(f"{name}.output.dense", hidden) + x)
    return model.classifier(torch.tanh(model.bert.pooler.dense(x[:, 0])))


@pytest.fixture
def setup(make_model: MakeModel, batch: dict[str, Tensor]) -> Setup:
    """A BERT, its tensorrt sites, values that clip a little, 2:4 masks, and its linears."""
    model = make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    use_hooked_attention(model)
    return prepared(model, batch, "tensorrt")


def prepared(model: PreTrainedModel, batch: dict[str, Tensor], placement: str) -> Setup:
    linears = choose_layers(model, Layers(), "quantize").chosen
    blocks = encoder_blocks(model)
    sites = discover_sites(model, batch, linears, blocks, PLACEMENTS[placement])
    amax: dict[str, Tensor] = {}

    def observe(site: str, x: Tensor) -> Tensor:
        owner = sites.shared_with[site]
        amax[owner] = torch.maximum(amax.get(owner, torch.tensor(0.0)), 0.8 * x.detach().abs().max())
        return x

    hooks = hook_sites(model, observe, sites.shared_with, blocks)
    with torch.no_grad():
        model(**batch)
    hooks.remove()
    masks = {name: nm_mask(model.get_submodule(name).weight.detach().abs(), parse_pattern("2:4")) for name in linears}
    return model, sites, amax, masks, linears


@contextmanager
def quantized(setup: Setup, learned: bool = False) -> Iterator[Quantizers]:
    model, sites, amax, masks, linears = setup
    quantizers = Quantizers(amax, sites.shared_with, learned)
    with fake_quantized_(model, masks, linears, quantizers, encoder_blocks(model)):
        yield quantizers


def test_the_model_is_the_one_written_out(setup: Setup, batch: dict[str, Tensor]) -> None:
    model = setup[0]
    with torch.no_grad():
        wanted = written_out(model, batch, setup)
        plain = model(**batch).logits
        with quantized(setup):
            got = model(**batch).logits
    assert torch.equal(got, wanted)
    assert not torch.allclose(got, plain, atol=1e-3), "the quantizers do something"


@pytest.mark.parametrize("site", ["nowhere:input", "bert.encoder.layer.0.attention.nothing:query"])
def test_an_insertion_that_fails_leaves_a_plain_model(setup: Setup, batch: dict[str, Tensor], site: str) -> None:
    model, sites, amax, masks, linears = setup
    quantizers = Quantizers({**amax, site: torch.tensor(1.0)}, {**sites.shared_with, site: site})
    with torch.no_grad():
        before, names = model(**batch).logits, [*model.state_dict()]
        with pytest.raises(AttributeError), fake_quantized_(model, masks, linears, quantizers, encoder_blocks(model)):
            pytest.fail("inserted")
        assert [*model.state_dict()] == names
        assert torch.equal(model(**batch).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_gradients_are_those_of_the_model_written_out(setup: Setup, batch: dict[str, Tensor]) -> None:
    model, _, _, masks, _ = setup
    weight = torch.tensor([[1.0, -2.0], [0.5, 1.0], [-1.0, 3.0]])
    (written_out(model, batch, setup) * weight).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with quantized(setup):
        (model(**batch).logits * weight).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    for name, mask in masks.items():
        assert not got[f"{name}.weight"][~mask].any()


def test_the_linear_placement_in_every_family(family: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model(family)
    use_eager(model)
    setup = prepared(model, batch, "linear")
    _, sites, amax, masks, linears = setup
    with torch.no_grad():
        before = model(**batch).logits
        with quantized(setup):
            got = model(**batch).logits
    handles, floats = [], {name: model.get_submodule(name).weight.data for name in linears}
    for name in linears:
        layer, value = model.get_submodule(name), amax[sites.shared_with[f"{name}:input"]]
        layer.weight.data = fake_weight(layer.weight.data, masks[name])
        hook = lambda m, args, value=value: (fake(args[0], value), *args[1:])  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        wanted = model(**batch).logits
    for handle in handles:
        handle.remove()
    for name in linears:
        model.get_submodule(name).weight.data = floats[name]
    assert torch.equal(got, wanted)
    assert not torch.equal(got, before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that is quantized."""
    seen: list[Tensor] = []
    quantize = module.fake_quantize
    monkeypatch.setattr(module, "fake_quantize", lambda x, *values: seen.append(x) or quantize(x, *values))
    return seen


def test_each_tensor_is_quantized_once(setup: Setup, batch: dict[str, Tensor], calls: list[Tensor]) -> None:
    model, sites = setup[:2]
    with quantized(setup) as quantizers, torch.no_grad():
        model(**batch)
        assert len(calls) == len(set(sites.shared_with.values())) == 2 * 10
        assert quantizers.cache == {}, "nothing is remembered"
        model(**batch)
        assert len(calls) == 2 * 20, "nor taken from the last forward pass"


class Shared(nn.Module):
    """Two linears on one tensor, and on another one of equal values where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.copy = self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        if self.fail:
            raise RuntimeError("stop")
        return first + self.b(x.clone() if self.copy else x)


@pytest.mark.parametrize(("copy", "count"), [(False, 1), (True, 2)])
def test_another_tensor_is_quantized_again(copy: bool, count: int, calls: list[Tensor]) -> None:
    model = Shared()
    model.copy = copy
    inserted = insert_quantizers_(model, shared_quantizers(), [])
    model(torch.randn(2, 4))
    assert len(calls) == count
    remove_quantizers_(model, inserted)


def shared_quantizers(learned: bool = False) -> Quantizers:
    shared_with = {"a:input": "a:input", "b:input": "a:input"}
    return Quantizers({"a:input": torch.tensor(0.5)}, shared_with, learned)


def test_no_tensor_is_kept_after_an_error() -> None:
    model = Shared()
    model.fail = True
    inserted = insert_quantizers_(model, shared_quantizers(), [])
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.randn(2, 4))
    assert inserted.quantizers.cache == {}
    remove_quantizers_(model, inserted)


def test_a_quantized_tensor_is_not_quantized_again(calls: list[Tensor]) -> None:
    quantizers = shared_quantizers()
    once = quantizers("a:input", torch.randn(2, 4))
    assert quantizers("b:input", once) is once
    assert len(calls) == 1


def test_learned_amax_starts_at_the_fixed_one_and_gets_gradients(setup: Setup, batch: dict[str, Tensor]) -> None:
    model, _, amax, _, _ = setup
    with quantized(setup), torch.no_grad():
        fixed = model(**batch).logits
    with quantized(setup, learned=True) as quantizers:
        logits = model(**batch).logits
        assert torch.equal(logits, fixed)
        logits.square().sum().backward()
        values = dict(zip(quantizers.index, quantizers.values, strict=True))
        assert set(values) == set(amax)
        assert all(value.grad is not None and value.grad.isfinite() for value in values.values())
        assert sum(bool(value.grad) for value in values.values()) >= len(values) - 1
        named = dict(model.named_parameters())
        assert all(any(value is p for p in named.values()) for value in values.values())
        with torch.no_grad():
            quantizers.values[0].fill_(-3.0)
            quantizers.values[1].fill_(7.0)
    first, second = sorted(amax)[:2]
    assert float(quantizers.amax()[first]) == 2.0**-40, "a value driven below zero is the smallest one"
    assert float(quantizers.amax()[second]) == 7.0


def test_fixed_amax_is_not_trained(setup: Setup, batch: dict[str, Tensor]) -> None:
    model = setup[0]
    with quantized(setup) as quantizers:
        model(**batch).logits.sum().backward()
        assert not any(value.requires_grad for value in quantizers.values)
        assert {float(b) for b in quantizers.amax().values()} == {float(b) for b in setup[2].values()}


def test_removal_gives_the_model_back(setup: Setup, batch: dict[str, Tensor]) -> None:
    model, _, _, masks, _ = setup
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with quantized(setup):
        assert QUANTIZERS in dict(model.named_children())
        assert len(model.state_dict()) > len(before)
    after = model.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        mask = masks.get(name.removesuffix(".weight"))
        wanted = tensor if mask is None else torch.where(mask, tensor, 0.0)
        assert torch.equal(after[name], wanted), name
        if mask is not None:
            assert not after[name][~mask].view(torch.int32).any(), "+0.0 to the bit"
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_the_block_removes_everything(setup: Setup) -> None:
    model = setup[0]
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), quantized(setup):
        raise RuntimeError("stop")
    assert sorted(model.state_dict()) == sorted(names)


def test_a_nan_amax_is_refused() -> None:
    with pytest.raises(ValueError, match="a:input: must be positive and finite, got nan"):
        Quantizers({"a:input": torch.tensor(float("nan"))}, {"a:input": "a:input"})


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_only_the_named_sites_are_hooked(placement: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("distilbert")
    use_hooked_attention(model)
    _, sites, *_ = prepared(model, batch, placement)
    seen: list[str] = []
    hooks = hook_sites(model, lambda site, x: seen.append(site) or x, sites.shared_with, encoder_blocks(model))
    with torch.no_grad():
        model(**batch)
    hooks.remove()
    assert sorted(seen) == sorted(sites.shared_with)
    assert {site.role for site in seen} >= {"input"}


def test_a_tensor_is_kept_until_all_sites_have_seen_it() -> None:
    quantizers = Quantizers({"a": torch.tensor(1.0), "c": torch.tensor(1.0)}, {"a": "a", "b": "a", "c": "c"})
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    y = quantizers("a", x)
    assert list(quantizers.cache) == ["a"]
    assert quantizers("b", x) is y
    assert not quantizers.cache
    quantizers("c", x)
    assert not quantizers.cache, "nobody else reads what one site quantizes"
    assert torch.equal(quantizers("b", x), y), "a site that comes again gets the same numbers"


@pytest.mark.parametrize("learned", [False, True])
def test_a_state_does_not_depend_on_the_order_of_the_sites(learned: bool) -> None:
    """A checkpoint's file gives its tensors in any order; a resumed run once had the values of other sites."""
    values = {"b": torch.tensor(2.0), "a": torch.tensor(1.0), "c": torch.tensor(3.0)}
    shared_with = {name: name for name in values}
    first = Quantizers(values, shared_with, learned)
    again = Quantizers(dict(reversed(values.items())), shared_with, learned)
    assert {name: float(value) for name, value in again.state_dict().items()} == {
        name: float(value) for name, value in first.state_dict().items()
    }
    again.load_state_dict(first.state_dict())
    assert {name: float(value) for name, value in again.amax().items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
