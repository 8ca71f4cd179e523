"""Hooks without quantizers change nothing, whatever a family hands to its attention; what they change is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqat
from scripts.families.registry import FAMILIES
from scripts.families.source import build_family
from sqat.compress import check_hooks as module
from sqat.compress.check_hooks import check_hooks, difference_of, largest_difference, run, run_hooked
from sqat.compress.quantize import attention_for
from sqat.models.attention import current_attention, use_eager
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.modules import attention
from sqat.modules.hooks import Hooks
from sqat.modules.site_discovery import hook_candidates
from sqat.modules.sites import PRODUCT_ROLES
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers
from tests.errors import raises_code
from tests.tiny import MakeModel

# Soft caps, sinks, windows, position biases, grouped heads, heads of one fused linear, attention of their own.
TRIED = ("bert", "distilbert", "albert", "deberta-v3", "modernbert", "longformer", "xlnet", "xmod", "gpt_neox", "llama",
         "gemma2", "gemma3_text", "gpt_oss", "phi3", "t5", "bart", "beit", "siglip", "swin", "convnext")  # fmt: skip


def inputs_of(name: str) -> dict[str, Tensor]:
    """Three texts that end with a separator, or three images."""
    family, draw = FAMILIES[name], torch.Generator().manual_seed(1)
    if family.kind == "image":
        return {"pixel_values": torch.randn(3, 3, family.side, family.side, generator=draw)}
    ids = torch.randint(5, 40, (3, 12), generator=draw)
    ends = torch.tensor([11, 8, 4])[:, None]
    mask = (torch.arange(12) <= ends).long()
    return {"input_ids": (ids * mask).scatter(1, ends, 3), "attention_mask": mask}


def layers_of(model: nn.Module) -> list[str]:
    return choose_layers(model, Layers(), "quantize").chosen


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "tensorrt-full"])
@pytest.mark.parametrize("name", TRIED)
def test_hooks_change_nothing(name: str, placement: str) -> None:
    model, inputs = build_family(FAMILIES[name]), inputs_of(name)
    layers = layers_of(model)
    if PLACEMENTS[placement].attention:
        use_eager(model)
    plain, hooked = run(model, inputs), run_hooked(model, inputs, layers, placement)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True)), "to the last bit on one machine"
    check_hooks(model, inputs, layers, placement)


@pytest.mark.parametrize("name", [name for name in TRIED if "interface" in FAMILIES[name].traits])
def test_every_operand_of_an_attention_in_the_interface_is_hooked_and_read(name: str) -> None:
    model, inputs = build_family(FAMILIES[name]), inputs_of(name)
    use_eager(model)
    plain = run(model, inputs)
    for role in PRODUCT_ROLES:
        seen: list[str] = []

        def change(site: Any, x: Tensor, role: str = role, seen: list[str] = seen) -> Tensor:
            seen.append(site.role)
            return x.square() + 0.5 if site.role == role else x  # no shift of all scores, which softmax would not see

        hooks = Hooks()
        with attention_for(model, "tensorrt"):
            hook_candidates(model, change, [], encoder_blocks(model), PLACEMENTS["tensorrt"], hooks)
            changed = run(model, inputs)
            hooks.remove()
        assert set(PRODUCT_ROLES) <= set(seen)
        assert largest_difference(plain, changed) > 1000, role


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_the_kernels_attention_is_that_of_their_families(name: str) -> None:
    model = build_family(FAMILIES[name])
    check_hooks(model, inputs_of(name), layers_of(model), "cpu")
    assert current_attention(model) == "sdpa"


@pytest.mark.parametrize(("name", "argument"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("t5", "position_bias")])
def test_an_argument_that_attention_does_not_compute_is_refused(
    name: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an attention function that swallows the argument: BERT's, whose heads are not grouped."""
    config = {"num_key_value_heads": 4} if "grouped" in FAMILIES[name].traits else {}
    family = SimpleNamespace(entries={**FAMILIES[name].entries, **config, "attn_logit_softcapping": 0.5}, kind="text")
    model, inputs = build_family(family), inputs_of(name)  # type: ignore[arg-type]
    layers = layers_of(model)
    with raises_code("unsupported-model", match=argument):
        check_hooks(model, inputs, layers, "cpu")
    bert = attention.own_eager(build_family(FAMILIES["bert"]).get_submodule("bert.encoder.layer.0.attention.self"))
    monkeypatch.setattr(attention, "eager_attention", lambda _: bert)
    with raises_code("unsupported-model", match=rf"{type(model).__name__}.*tensorrt.*differ by"):
        check_hooks(model, inputs, layers, "tensorrt")
    assert current_attention(model) in ("sdpa", "eager")
    check_hooks(model, inputs, layers, "linear")


def test_other_weights_than_those_of_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention with a sink, which no argument tells."""
    model, inputs = build_family(FAMILIES["bert"]), inputs_of("bert")

    def eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
        weights = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2), weights

    monkeypatch.setattr(attention, "eager_attention", lambda _: eager)
    with raises_code("unsupported-model", match="BertSelfAttention computes other weights"):
        check_hooks(model, inputs, layers_of(model), "cpu")


@pytest.mark.parametrize("products", [0, 1, 3])
def test_attention_of_other_than_two_products_is_refused(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_family(FAMILIES["bert"]), inputs_of("bert")

    def eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        for _ in range(products):
            q @ k.transpose(2, 3)
        return v.transpose(1, 2), v

    monkeypatch.setattr(attention, "eager_attention", lambda _: eager)
    with raises_code("unsupported-model", match=f"BertSelfAttention computes {products} products"):
        check_hooks(model, inputs, layers_of(model), "tensorrt")


def test_attention_without_an_eager_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build_family(FAMILIES["bert"]), inputs_of("bert")
    monkeypatch.setattr(attention, "eager_attention", lambda _: None)
    for placement in ("tensorrt", "cpu"):
        with raises_code("unsupported-model", match="BertSelfAttention has no eager"):
            check_hooks(model, inputs, layers_of(model), placement)


class Noisy(nn.Module):
    """Blocks of linears between something that does not repeat itself."""

    def __init__(self, disturb: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.disturb = disturb

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = self.disturb(block(x))
        return {"out": x}


def counter(step: float) -> Callable[[Tensor], Tensor]:
    """A function that adds more with each call."""
    calls: list[int] = []

    def disturb(x: Tensor) -> Tensor:
        calls.append(1)
        return x + step * len(calls)

    return disturb


@pytest.mark.parametrize("disturb", [lambda x: x + torch.rand_like(x), counter(1e-3)], ids=["drawn", "counted"])
def test_a_model_that_does_not_repeat_itself_is_not_blamed_on_hooks(disturb: Callable[[Tensor], Tensor]) -> None:
    check_hooks(Noisy(disturb), {"x": torch.randn(3, 4, 16)}, ["blocks.0", "blocks.1"], "linear")


def test_a_model_that_hooks_change_is_refused_in_every_placement() -> None:
    model = Noisy(lambda x: x)
    model.disturb = lambda x: x + 1e-4 * bool(model.blocks[0]._forward_pre_hooks)
    for placement in ("linear", "tensorrt"):
        with raises_code("unsupported-model", match=f"Noisy.*{placement}.*differ by"):
            check_hooks(model, {"x": torch.randn(3, 4, 16)}, ["blocks.0", "blocks.1"], placement)
    assert not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_calibration_checks_hooks_before_anything_is_observed(
    placement: str, make_model: MakeModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("bert")
    monkeypatch.setattr(module, "run_hooked", lambda model, inputs, *_: [x + 1e-3 for x in run(model, inputs)])

    def batches() -> Any:
        yield batch
        raise AssertionError("a second batch is read")

    with raises_code("unsupported-model"):
        sqat.calibrate(model, batches(), placement=placement)  # type: ignore[arg-type]


def test_differences_count_in_units_of_the_largest_value() -> None:
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([8.0, 1.0, infinity, nan])
    assert difference_of(x, x.clone()) == 0
    for index, value in ((0, nan), (2, 1.0), (2, -infinity), (3, 0.0), (1, infinity)):
        other = x.clone()
        other[index] = value
        assert difference_of(x, other) == infinity
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        y = x.to(dtype)
        eps = torch.finfo(dtype).eps
        assert difference_of(y, y + torch.tensor([8 * eps, 0, 0, 0], dtype=dtype)) == pytest.approx(1)
    zeros = torch.zeros(3)
    assert difference_of(zeros, zeros + 1e-3) > 1e6
    assert largest_difference([x], [x, x]) == infinity
    assert largest_difference([x], [x[:2]]) == infinity
    assert largest_difference([zeros, x], [zeros, x]) == 0


def test_each_float_of_an_output_is_compared() -> None:
    x, zeros, numbers = torch.ones(4), torch.zeros(3), torch.ones(2, dtype=torch.long)
    fields = {"a": x, "b": (None, [zeros, numbers]), "c": torch.empty(0), "output": (zeros,), "d": SimpleNamespace(x=x)}
    for output in (fields, SimpleNamespace(**fields)):
        found = run(Returning(output), {})
        assert [y is z for y, z in zip(found, (x, zeros, zeros), strict=True)] == [True, True, True]
    assert run(Returning(x), {})[0] is x
    assert run(Returning((x, [zeros])), {})[1] is zeros


class Returning(nn.Module):
    """Returns what it is given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> object:
        return self.output
