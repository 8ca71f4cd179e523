"""Which layers are treated, and which make q, k and v of the last block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sqat.models.layer_selection import choose_layers, encoder_blocks, find_qkv
from sqat.recipe.stages import Layers
from tests.errors import raises_code
from tests.models.loading import MakeModel, problem

BLOCKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "modernbert": "model.layers",
    "deberta-v2": "deberta.encoder.layer",
    "deberta": "deberta.encoder.layer",
    "llama": "model.layers",
}


QKV = {
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "roberta": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "electra": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "modernbert": ("attn.Wqkv",),
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "deberta-v2": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
}


@pytest.mark.parametrize("family", list(BLOCKS))
def test_blocks_are_found(family: str, make_model: MakeModel) -> None:
    assert encoder_blocks(make_model(family)) == [f"{BLOCKS[family]}.0", f"{BLOCKS[family]}.1"]


@pytest.mark.parametrize("family", list(QKV))
def test_qkv_of_the_last_block_are_found(family: str, make_model: MakeModel) -> None:
    assert find_qkv(make_model(family)) == tuple(f"{BLOCKS[family]}.1.{name}" for name in QKV[family])


class Block(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(16, 16))


class MadeUp(nn.Module):
    """Blocks of linears by any names, and a longer list of unlike modules that is no encoder."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))])
        self.blocks = nn.ModuleList([Block(*names), Block(*names)])


def test_blocks_are_alike() -> None:
    assert encoder_blocks(MadeUp("a")) == ["blocks.0", "blocks.1"]


def test_a_model_without_blocks_is_refused() -> None:
    assert problem(encoder_blocks, nn.Sequential(nn.Linear(4, 4))) == (
        "no encoder blocks with linear layers were found in the model; "
        "Sequential is not a transformer encoder that sqat can treat"
    )


@pytest.mark.parametrize(
    "names",
    [("to_q", "to_k", "to_v"), ("query", "key"), ("q", "query", "k", "v"), ("query_key_value",), ("qkv", "q")],
)
def test_qkv_that_cannot_be_told_name_the_candidates(names: tuple[str, ...]) -> None:
    candidates = ", ".join(f"blocks.1.{name}" for name in names)
    assert problem(find_qkv, MadeUp(*names)) == (
        "which linears make q, k and v of the last block cannot be told from their names; "
        "name three linears (or one fused) as qkv (in a recipe, distill.qkv), or distil outputs only "
        f"(distill: {{minilm_weight: 0}}); it has: {candidates}"
    )


def test_interleaved_heads_are_not_taken_for_fused_qkv(make_model: MakeModel) -> None:
    assert "deberta.encoder.layer.1.attention.self.in_proj" in problem(find_qkv, make_model("deberta"))


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("w_q", "w_k", "w_v"), ("Wq", "Wk", "Wv")])
def test_ordinary_names_of_qkv(names: tuple[str, ...]) -> None:
    assert find_qkv(MadeUp("out", *reversed(names))) == tuple(f"blocks.1.{name}" for name in names)


def test_the_recipe_may_name_qkv() -> None:
    model = MadeUp("to_q", "to_k", "to_v")
    wanted = [f"blocks.0.to_{x}" for x in "qkv"]
    assert find_qkv(model, wanted) == tuple(wanted)
    assert problem(find_qkv, model, ["blocks.0.to_q", "blocks.0.x", "blocks.0.to_v"]) == (
        "qkv names blocks.0.x; give three linear layers or one fused"
    )
    assert problem(find_qkv, model, wanted[:2]) == "qkv names 2; give three linear layers or one fused"


def test_rule_b8_with_its_reasons(make_model: MakeModel) -> None:
    model = make_model("bert", hidden_size=40, intermediate_size=36, num_attention_heads=2)
    layer = "bert.encoder.layer.0"
    for_pruning = "is not a multiple of [8, 16] (rule B8)"
    choice = choose_layers(make_model("bert", intermediate_size=48), Layers(), "prune")
    assert [name.removeprefix("bert.encoder.layer.") for name in choice.chosen] == [
        f"{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    outside = "outside the encoder blocks (rule B8)"
    assert choice.skipped == {"bert.pooler.dense": outside, "classifier": outside}
    assert problem(choose_layers, model, Layers(), "prune") == (
        f"no layer is left to prune: [40, 40] {for_pruning}; widen include, or shorten exclude"
    )
    quantize = choose_layers(model, Layers(exclude=("*.output.dense",)), "quantize")
    assert f"{layer}.intermediate.dense" in quantize.chosen
    assert quantize.skipped[f"{layer}.output.dense"] == "excluded"


def test_small_layers_stay_as_they_are(make_model: MakeModel) -> None:
    model = make_model("bert", intermediate_size=12)
    pruned = choose_layers(model, Layers(), "prune").skipped
    assert pruned["bert.encoder.layer.0.intermediate.dense"] == "[12, 32] is not a multiple of [8, 16] (rule B8)"
    assert pruned["bert.encoder.layer.0.output.dense"] == "[32, 12] is not a multiple of [8, 16] (rule B8)"
    quantized = choose_layers(model, Layers(), "quantize").skipped
    assert quantized["bert.encoder.layer.0.intermediate.dense"] == "[12, 32] is smaller than 16 (rule B8)"
    assert quantized["bert.encoder.layer.0.output.dense"] == "[32, 12] is smaller than 16 (rule B8)"


def test_inputs_must_hold_whole_groups(make_model: MakeModel) -> None:
    left = choose_layers(make_model("bert", intermediate_size=48), Layers(), "prune", 32).skipped
    assert left["bert.encoder.layer.0.output.dense"] == "[32, 48] is not a multiple of [8, 32] (rule B8)"


def test_globs_choose(make_model: MakeModel) -> None:
    layers = Layers(include=("*.query", "bert.pooler.*"), exclude=("*.layer.1.*",))
    choice = choose_layers(make_model("bert"), layers, "quantize")
    assert choice.chosen == ["bert.encoder.layer.0.attention.self.query", "bert.pooler.dense"]
    assert choice.skipped["bert.encoder.layer.1.attention.self.query"] == "excluded"
    assert choice.skipped["bert.encoder.layer.0.attention.self.key"] == "not included by the recipe"


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_glob_that_matches_nothing(field: str, make_model: MakeModel) -> None:
    layers = Layers(**{field: ("*.query", "*.queri")})
    start = "bert.encoder.layer.0.attention.self."
    assert problem(choose_layers, make_model("bert"), layers, "prune") == (
        f"layers: '*.queri' matches no layer; the model has {start}query, {start}key, {start}value, ... (14 in all)"
    )


UNTREATABLE: list[tuple[Callable[[nn.Module], object], str]] = [
    (weight_norm, "its weight is computed by the model (WeightNorm)"),
    (spectral_norm, "its weight is computed by the model (SpectralNorm)"),
    (lambda layer: prune.identity(layer, "weight"), "its weight is computed by the model (bias, weight_orig)"),
    (lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to(torch.int8), False)),
     "its weight is int8, not float"),
    (lambda layer: None, "its forward is never called"),
]  # fmt: skip


@pytest.mark.parametrize("purpose", ["prune", "quantize"])
@pytest.mark.parametrize(("spoil", "reason"), UNTREATABLE)
def test_what_cannot_be_treated_is_left_alone_unless_it_is_named(
    spoil: Callable[[nn.Module], object], reason: str, purpose: str, make_model: MakeModel
) -> None:
    model, name = make_model("bert"), "bert.encoder.layer.1.attention.self.key"
    spoil(model.get_submodule(name))
    idle = {name} if "never called" in reason else set()
    for include in (None, ("*.key",), ("*.key", "*.query")):
        choice = choose_layers(model, Layers(include=include), purpose, idle=idle)
        assert choice.skipped[name] == reason
        assert name.replace("layer.1", "layer.0") in choice.chosen
    for include in ((name,), ("*.layer.1.*.key",), ("*.query", "*1.attention.self.k?y")):
        with raises_code("no-layer", f"selects no layer to {purpose}"):
            choose_layers(model, Layers(include=include), purpose, idle=idle)
    excluded = Layers(include=("*.query", name), exclude=(name,))
    assert choose_layers(model, excluded, purpose, idle=idle).skipped[name] == "excluded"


def test_a_block_that_stands_twice_counts_once(make_model: MakeModel) -> None:
    layers = (model := make_model("bert", num_hidden_layers=4)).bert.encoder.layer
    layers[1], layers[3] = layers[0], layers[2]
    assert encoder_blocks(model) == ["bert.encoder.layer.0", "bert.encoder.layer.2"]
    assert len(choose_layers(model, Layers(), "prune").chosen) == 12


class Standardized(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / 2, self.bias)


class Named(nn.Linear):
    """A subclass that computes what torch's linear does."""


def test_a_subclass_that_computes_with_another_weight_is_left_alone() -> None:
    layers = [nn.Conv2d(16, 16, 1), Standardized(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)]
    choice = choose_layers(nn.Sequential(*layers, Halved(16, 16), Named(16, 16), nn.Linear(16, 16)), Layers(), "prune")
    assert choice.chosen == ["2", "3", "5"]
    assert "Standardized" in choice.skipped["1"]
    assert "Halved" in choice.skipped["4"]
