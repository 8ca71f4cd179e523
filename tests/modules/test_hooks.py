"""Hooks: they see the right tensors under the right names, change nothing by themselves and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack as mode_stack
from transformers import PreTrainedModel

from sqat.models.attention import use_eager, use_hooked_attention
from sqat.models.layer_selection import encoder_blocks, linear_layers
from sqat.modules.attention import hooked_attention
from sqat.modules.hooks import ATTENTION_HOOK, Hooks, hook_adds, hook_attention, hook_linears
from sqat.modules.site_discovery import list_inner_modules

MakeModel = Callable[..., PreTrainedModel]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
INTERFACE = ("bert", "roberta", "distilbert", "electra", "modernbert")


def hook_all(model: nn.Module, hook: Callable[[str, Tensor], Tensor]) -> Hooks:
    """Put a hook at every site."""
    blocks = encoder_blocks(model)
    names = [name for name in linear_layers(model) if name.startswith(tuple(blocks))]
    hooks = hook_linears(model, hook, names, names)
    hook_attention(model, hook, list_inner_modules(model, blocks), hooks)
    return hook_adds(model, hook, blocks, hooks)


def leftovers(model: nn.Module) -> list[str]:
    """Return the hooks and attributes that are on a model."""
    found = [f"{name}.{kind}" for name, m in model.named_modules() for kind in HOOKS if getattr(m, kind)]
    return found + [name for name, module in model.named_modules() if hasattr(module, ATTENTION_HOOK)]


def run(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def test_hooks_change_nothing_and_leave_nothing(family: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model(family)
    use_eager(model)
    before, attributes = run(model, batch), {n: set(vars(m)) for n, m in model.named_modules()}
    assert use_hooked_attention(model) is (family in INTERFACE)
    seen: list[str] = []

    def hook(site: str, x: Tensor) -> Tensor:
        seen.append(site)
        return x

    hooks = hook_all(model, hook)
    assert torch.equal(run(model, batch), before), "hooked attention is eager attention to the bit"
    assert len(seen) == len(set(seen)), "every site is passed once"
    hooks.remove()
    seen.clear()
    assert torch.equal(run(model, batch), before)
    assert not seen
    assert leftovers(model) == []
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert mode_stack() == []
    hooks.remove()


def test_what_a_hook_returns_is_what_the_model_reads(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert")
    use_hooked_attention(model)
    output = model.bert.encoder.layer[1].output

    def double(site: str, x: Tensor) -> Tensor:
        return 2 * x if site.endswith(("1.output.dense:input", "1.output:add0.right", "1.output.dense:output")) else x

    caught: dict[str, Tensor] = {}
    handle = output.register_forward_hook(lambda m, args, y: caught.update(hidden=args[0], skip=args[1], y=y))
    hooks = hook_all(model, double)
    run(model, batch)
    hooks.remove()
    handle.remove()
    wanted = output.LayerNorm(2 * output.dense(2 * caught["hidden"]) + 2 * caught["skip"])
    assert torch.equal(caught["y"], wanted)


@pytest.mark.parametrize("role", ["query", "key", "softmax", "value"])
def test_attention_reads_its_hooked_operands(role: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert")
    use_hooked_attention(model)
    name = "bert.encoder.layer.0.attention.self"
    operands: dict[str, Tensor] = {}

    def hook(site: str, x: Tensor) -> Tensor:
        assert site.startswith(f"{name}:")
        operands[site.removeprefix(f"{name}:")] = x + 0.5 if site.endswith(role) else x
        return operands[site.removeprefix(f"{name}:")]

    hooks = hook_attention(model, hook, [name])
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: caught.append(y[0]))
    run(model, batch)
    hooks.remove()
    handle.remove()
    assert list(operands) == ["query", "key", "softmax", "value"]
    assert operands["softmax"].shape == (3, 2, 12, 12)
    assert operands["value"].shape == (3, 2, 12, 16)
    wanted = (operands["softmax"] @ operands["value"]).transpose(1, 2).flatten(2)
    assert torch.equal(caught[0], wanted)
    scores = operands["query"] @ operands["key"].transpose(2, 3) / 4
    scores = scores.masked_fill(batch["attention_mask"][:, None, None] == 0, -torch.inf)
    softmax = operands["softmax"] - 0.5 if role == "softmax" else operands["softmax"]
    torch.testing.assert_close(softmax, scores.softmax(-1))


def test_hooked_attention_repeats_grouped_heads_and_drops_like_eager(make_model: MakeModel) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = make_model("llama").get_submodule("model.layers.0.self_attn").train()
    torch.manual_seed(1)
    hooks = hook_attention(nn.Sequential(module), lambda site, x: x + 1 if site == "0:softmax" else x, ["0"])
    output, _ = hooked_attention(module, query, key, value, None, scaling=0.25, dropout=0.5)
    hooks.remove()
    torch.manual_seed(1)
    keep = torch.nn.functional.dropout(torch.ones(2, 4, 5, 5), 0.5)
    for b in range(2):
        for head in range(4):
            p = (query[b, head] @ key[b, head // 2].T * 0.25).softmax(-1) + 1  # hooked before the dropout
            torch.testing.assert_close(output[b, :, head], (p * keep[b, head]) @ value[b, head // 2])


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x * 2)


class Block(nn.Module):
    """Three residual adds here and one inside, among sums that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.bias = nn.Parameter(torch.ones(4))
        self.position = nn.Parameter(torch.ones(2, 3, 4))
        self.fail = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first = x + x.sin()
        inside = self.inner(first)
        if self.fail:
            raise RuntimeError("stop")
        plain = inside + self.bias + 1.0 + self.position  # a row, a number, a parameter
        plain = plain + x.sum(-1, keepdim=True) + x.mean(0)  # other shapes
        scores = plain @ plain.transpose(1, 2)
        scores = scores + scores.tanh()  # [B,T,T]
        ids = torch.ones(x.shape, dtype=torch.int64)
        wide = torch.cat((plain, plain), -1)
        wide = wide + wide.tanh()  # [B,T,2H]
        second = (scores @ plain).add(wide[..., :4])
        return second.__radd__(x) + ids[..., :1]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = x + x  # outside the blocks
        for block in self.blocks:
            x = block(x=x)
        return x + x


def test_other_sums_are_not_residual_adds() -> None:
    model, seen = Stack(), []

    def hook(site: str, x: Tensor) -> Tensor:
        seen.append(site)
        return x

    x = torch.randn(2, 3, 4)
    before = model(x)
    hooks = hook_adds(model, hook, ["blocks.0", "blocks.1"])
    assert torch.equal(model(x), before)
    model(x)
    hooks.remove()
    adds = (":add0", ".inner:add0", ":add1", ":add2")
    wanted = [f"blocks.{i}{add}.{side}" for i in (0, 1) for add in adds for side in ("left", "right")]
    assert seen == 2 * wanted


def test_an_error_inside_a_block_ends_the_mode() -> None:
    model, seen = Stack(), []
    hooks = hook_adds(model, lambda site, x: seen.append(site) or x, ["blocks.0", "blocks.1"])
    model.blocks[1].fail = True
    with pytest.raises(RuntimeError, match="stop"):
        model(torch.randn(2, 3, 4))
    assert mode_stack() == []
    model.blocks[1].fail = False
    seen.clear()
    model(torch.randn(2, 3, 4))
    assert seen[0] == "blocks.0:add0.left"
    assert len(seen) == 16
    hooks.remove()
    assert leftovers(model) == []


def test_gradients_pass_through_hooks(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, Any]:
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    model = make_model("bert")
    use_eager(model)
    before = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    use_hooked_attention(model)
    hooks = hook_all(model, lambda site, x: x)
    after = gradients(model)
    hooks.remove()
    assert all(torch.equal(grad, after[name]) for name, grad in before.items())
