"""Which sites a placement quantizes, which share a quantizer, which stay float and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqat.models.attention import use_hooked_attention
from sqat.models.layer_selection import choose_layers, encoder_blocks
from sqat.modules.site_discovery import discover_sites
from sqat.modules.sites import Site, Sites, align_positions
from sqat.quantization.placement import PLACEMENTS
from sqat.recipe.stages import Layers

MakeModel = Callable[..., PreTrainedModel]
AT_PRODUCT = "quantized where the attention product reads it"
AT_OUTPUT = "quantized at the linear's output"
B8 = "input of an activation function (rule B8)"
BERT_LINEAR = {
    "attention.self.query:input": "attention.self.query:input",
    "attention.self.key:input": "attention.self.query:input",
    "attention.self.value:input": "attention.self.query:input",
    "attention.output.dense:input": "attention.output.dense:input",
    "intermediate.dense:input": "intermediate.dense:input",
    "output.dense:input": "output.dense:input",
}
BERT_MORE = {
    "attention.self:query": "attention.self:query",
    "attention.self:key": "attention.self:key",
    "attention.self:value": "attention.self:value",
    "attention.self:softmax": "attention.self:softmax",
    "attention.output.dense:output": "attention.output.dense:output",
    "attention.output:add0.right": "attention.self.query:input",
    "output.dense:output": "output.dense:output",
    "output:add0.right": "intermediate.dense:input",
}
BERT_SKIPPED = {
    "attention.self.query:output": AT_PRODUCT,
    "attention.self.key:output": AT_PRODUCT,
    "attention.self.value:output": AT_PRODUCT,
    "intermediate.dense:output": B8,
    "attention.output:add0.left": AT_OUTPUT,
    "output:add0.left": AT_OUTPUT,
}
# Family -> first linear of a block, its sites' shared_with and what is left, both below the block (a site of the block
# itself begins with a colon).
DISTILBERT = {
    "attention.q_lin:input": "attention.q_lin:input",
    "attention.k_lin:input": "attention.q_lin:input",
    "attention.v_lin:input": "attention.q_lin:input",
    "attention:query": "attention:query",
    "attention:key": "attention:key",
    "attention:value": "attention:value",
    "attention:softmax": "attention:softmax",
    "attention.out_lin:input": "attention.out_lin:input",
    "attention.out_lin:output": "attention.out_lin:output",
    ":add0.right": "attention.q_lin:input",
    "ffn.lin1:input": "ffn.lin1:input",
    "ffn.lin2:input": "ffn.lin2:input",
    "ffn.lin2:output": "ffn.lin2:output",
    ":add1.right": "ffn.lin1:input",
}
DISTILBERT_SKIPPED = {
    **{f"attention.{x}_lin:output": AT_PRODUCT for x in "qkv"},
    "ffn.lin1:output": B8,
    ":add0.left": AT_OUTPUT,
    ":add1.left": AT_OUTPUT,
}
MPNET = {
    "attention.attn.q:input": "attention.attn.q:input",
    "attention.attn.k:input": "attention.attn.q:input",
    "attention.attn.v:input": "attention.attn.q:input",
    **{f"attention.attn.{x}:output": f"attention.attn.{x}:output" for x in "qkvo"},
    "attention.attn.o:input": "attention.attn.o:input",
    "attention:add0.right": "attention.attn.q:input",
    "intermediate.dense:input": "intermediate.dense:input",
    "output.dense:input": "output.dense:input",
    "output.dense:output": "output.dense:output",
    "output:add0.right": "intermediate.dense:input",
}
MPNET_SKIPPED = {"intermediate.dense:output": B8, "attention:add0.left": AT_OUTPUT, "output:add0.left": AT_OUTPUT}
MODERNBERT = {
    **{site: site for site in ("attn.Wqkv:input", "attn.Wqkv:output", "attn.Wo:input", "attn.Wo:output")},
    **{f"attn:{part}": f"attn:{part}" for part in ("query", "key", "value", "softmax")},
    ":add0.left": ":add0.left",
    "mlp.Wi:input": "mlp.Wi:input",
    "mlp.Wo:input": "mlp.Wo:input",
    "mlp.Wo:output": "mlp.Wo:output",
    ":add1.left": ":add1.left",
}
MODERNBERT_SKIPPED = {"mlp.Wi:output": B8, ":add0.right": AT_OUTPUT, ":add1.right": AT_OUTPUT}
DEBERTA = {
    "attention.self.query_proj:input": "attention.self.query_proj:input",
    "attention.self.key_proj:input": "attention.self.query_proj:input",
    "attention.self.value_proj:input": "attention.self.query_proj:input",
    **{f"attention.self.{x}_proj:output": f"attention.self.{x}_proj:output" for x in ("query", "key", "value")},
    **{site: site for site in ("attention.output.dense:input", "attention.output.dense:output")},
    "attention.output:add0.right": "attention.self.query_proj:input",
    **{site: site for site in ("intermediate.dense:input", "output.dense:input", "output.dense:output")},
    "output:add0.right": "intermediate.dense:input",
}
DEBERTA_SKIPPED = {
    "intermediate.dense:output": B8,
    "attention.output:add0.left": AT_OUTPUT,
    "output:add0.left": AT_OUTPUT,
}
BERT = {**BERT_LINEAR, **BERT_MORE}
EXPECTED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "bert": (BERT, BERT_SKIPPED),
    "roberta": (BERT, BERT_SKIPPED),
    "electra": (BERT, BERT_SKIPPED),
    "distilbert": (DISTILBERT, DISTILBERT_SKIPPED),
    "mpnet": (MPNET, MPNET_SKIPPED),
    "modernbert": (MODERNBERT, MODERNBERT_SKIPPED),
    "deberta-v2": (DEBERTA, DEBERTA_SKIPPED),
}
GROUPS = {
    "distilbert": [f"attention:{part}" for part in ("query", "key", "value")],
    "mpnet": [f"attention.attn.{x}:output" for x in "qkv"],
    "modernbert": [*(f"attn:{part}" for part in ("query", "key", "value")), "attn.Wqkv:output"],
    "deberta-v2": [f"attention.self.{x}_proj:output" for x in ("query", "key", "value")],
}
BERT_GROUPS = [f"attention.self:{part}" for part in ("query", "key", "value")]


def discover(model: PreTrainedModel, batch: dict[str, Tensor], placement: str) -> Sites:
    if placement != "linear":
        use_hooked_attention(model)
    linears = choose_layers(model, Layers(), "quantize").chosen
    return discover_sites(model, batch, linears, encoder_blocks(model), PLACEMENTS[placement])


def inside(block: str, site: str) -> str | None:
    """The site's name below a block, None if it lies elsewhere."""
    if not site.startswith((f"{block}.", f"{block}:")):
        return None
    return site[len(block) :].removeprefix(".")


@pytest.mark.parametrize("family", list(EXPECTED))
def test_sites_of_each_placement(family: str, make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    wanted, left = EXPECTED[family]
    model = make_model(family)
    sites = discover(model, batch, "tensorrt")
    blocks = encoder_blocks(model)
    for block in blocks:
        shared_with = {inside(block, site): inside(block, owner) for site, owner in sites.shared_with.items()}
        shared_with.pop(None, None)
        no_norm = family == "modernbert" and block == blocks[0]  # its first block adds what its attention reads
        assert shared_with == (wanted | {":add0.left": "attn.Wqkv:input"} if no_norm else wanted)
        reasons = {inside(block, site): reason for site, reason in sites.skipped.items()}
        reasons.pop(None, None)
        assert reasons == left
    assert len(sites.shared_with) == len(wanted) * len(blocks)
    below = GROUPS.get(family, BERT_GROUPS)
    assert sites.shared_amax_groups == [tuple(f"{block}.{part}" for part in below) for block in blocks]
    linear = discover(model, batch, "linear")
    inputs = {site: owner for site, owner in sites.shared_with.items() if site.role == "input"}
    assert linear.shared_with == inputs
    assert linear.shared_amax_groups == []
    assert linear.skipped == {}


@pytest.mark.parametrize("family", list(EXPECTED))
def test_the_full_placement_quantizes_every_output(
    family: str, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model(family)
    some, full = discover(model, batch, "tensorrt"), discover(model, batch, "tensorrt-full")
    more = {site for site, reason in some.skipped.items() if reason == B8}
    assert more
    assert full.shared_with == some.shared_with | {site: site for site in more}
    assert full.skipped == {site: reason for site, reason in some.skipped.items() if reason != B8}
    assert full.shared_amax_groups == some.shared_amax_groups


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "mish", "relu2"]
)
def test_the_input_of_every_activation_function_stays_float(
    name: str, make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    sites = discover(make_model("bert", hidden_act=name), batch, "tensorrt")
    assert sites.skipped["bert.encoder.layer.0.intermediate.dense:output"] == B8
    assert not [site for site in sites.shared_with if "intermediate" in site and site.role != "input"]


def test_only_the_named_linears_have_sites(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert")
    linears = ["bert.encoder.layer.1.output.dense"]
    sites = discover_sites(model, batch, linears, encoder_blocks(model), PLACEMENTS["linear"])
    assert sites.shared_with == {f"{linears[0]}:input": f"{linears[0]}:input"}


def test_discovery_does_not_change_the_model(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model("bert").train()
    model.bert.embeddings.requires_grad_(False)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    discover(model, batch, "tensorrt")
    assert model.training
    assert model.bert.encoder.layer[0].training
    assert torch.equal(torch.get_rng_state(), state), "no dropout was drawn"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("site", "shape"),
    [("a:input", (3, 12, 8)), ("a:query", (3, 2, 12, 4)), ("a:value", (3, 2, 12, 4)), ("a:softmax", (3, 2, 12, 12))],
)
def test_padding_does_not_count(site: str, shape: tuple[int, ...], batch: dict[str, Tensor]) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    real = batch["attention_mask"].bool()
    values, keep = align_positions(Site(site), x, batch["attention_mask"])
    wanted: list[float] = []
    for b in range(3):
        for t in range(12):
            if not real[b, t]:
                continue
            if site == "a:softmax":
                wanted += [x[b, h, t, s].item() for h in range(2) for s in range(12) if real[b, s]]
            else:
                wanted += (x[b, :, t] if len(shape) == 4 else x[b, t]).flatten().tolist()
    assert keep.dtype == torch.bool
    assert sorted(values[keep].flatten().tolist()) == sorted(wanted)


@pytest.mark.parametrize("shape", [(3, 8), (1, 16, 8)])
def test_tensors_without_tokens_count_as_a_whole(shape: tuple[int, ...], batch: dict[str, Tensor]) -> None:
    x = torch.randn(shape)
    values, keep = align_positions(Site("pooler:input"), x, batch["attention_mask"])
    assert values[keep].numel() == x.numel()
