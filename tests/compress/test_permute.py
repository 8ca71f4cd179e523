"""Channels in another order: the dense model computes the same, groups are those of the graph, and more is kept."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqat.compress.channels import ChannelGroup, find_channel_groups, relative_change, reorder_, run_model
from sqat.compress.patterns import choose_patterns
from sqat.compress.permute import fixed_by_relation_heads, permute_
from sqat.data.batch import Batch
from sqat.distillation import RelationLoss
from sqat.distillation.minilm_v1 import MiniLMv1
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relations import QKV
from sqat.models.conv1d import to_linears_
from sqat.models.layer_selection import find_qkv
from sqat.recipe.stages import Layers
from sqat.sparsity.criteria.magnitude import Magnitude
from sqat.sparsity.criteria.sparsegpt import SparseGPT
from sqat.sparsity.criteria.wanda import Wanda
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.permutation import sum_kept_scores
from sqat.stages.prune import example_inputs
from sqat.training.batches import Batches
from tests.errors import raises_code
from tests.tiny import CONFIGS, MakeModel

TWO_OF_FOUR = Pattern(2, 4)
Inputs = dict[str, Tensor]
BY_HEAD, WHOLE = (2, 1, 1), (1, 1, 1)  # heads, parts of the producer and how many of them
GROUPS: dict[str, list[tuple[str, str, tuple[int, int, int]]]] = {
    "bert": [
        ("attention.output.dense", "attention.self.value", BY_HEAD),
        ("output.dense", "intermediate.dense", WHOLE),
    ],
    "distilbert": [("attention.out_lin", "attention.v_lin", BY_HEAD), ("ffn.lin2", "ffn.lin1", WHOLE)],
    "mpnet": [("attention.attn.o", "attention.attn.v", BY_HEAD), ("output.dense", "intermediate.dense", WHOLE)],
    "modernbert": [("attn.Wo", "attn.Wqkv", (2, 3, 1)), ("mlp.Wo", "mlp.Wi", (1, 2, 2))],
    "deberta-v2": [
        ("attention.output.dense", "attention.self.value_proj", BY_HEAD),
        ("output.dense", "intermediate.dense", WHOLE),
    ],
    "deberta": [("output.dense", "intermediate.dense", WHOLE)],  # a bias of its values is in no linear
    "albert": [("attention.dense", "attention.value", BY_HEAD), ("ffn_output", "ffn", WHOLE)],
    "bart": [("self_attn.out_proj", "self_attn.v_proj", BY_HEAD), ("fc2", "fc1", WHOLE)],
}
GROUPS |= dict.fromkeys(("roberta", "electra"), GROUPS["bert"])
GROUPS["llama"] = [("self_attn.o_proj", "self_attn.v_proj", BY_HEAD),
                 ("mlp.down_proj", "mlp.up_proj mlp.gate_proj", WHOLE)]  # fmt: skip
GROUPS |= dict.fromkeys(("qwen2", "mistral"), GROUPS["llama"])
GROUPS["gpt2"] = [("attn.c_proj", "attn.c_attn", (2, 3, 1)), ("mlp.c_proj", "mlp.c_fc", WHOLE)]


@pytest.fixture(autouse=True)
def quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start is enough here."""
    monkeypatch.setattr("sqat.sparsity.permutation.COLUMNS_TRIED", 1)


def inputs_for(family: str, batch: Inputs) -> Inputs:
    """The batch; BART reads its sentence at the last separator."""
    if family != "bart":
        return batch
    return {**batch, "input_ids": batch["input_ids"].index_fill(1, torch.tensor([3]), 3)}


def plain(family: str, make_model: MakeModel) -> nn.Module:
    """A model as sqat loads it."""
    model = make_model(family)
    to_linears_(model)
    model.config.use_cache = False
    return model


def collect_nothing(owners: object) -> dict[str, Tensor]:
    """The statistics of criterion magnitude."""
    return {}


def permuted(model: nn.Module, inputs: Inputs, **more: Any) -> list[str]:
    return permute_(model, inputs, choose_patterns(model, Layers(), "2:4")[0], Magnitude(), collect_nothing, **more)


@pytest.mark.parametrize("family", CONFIGS)
def test_channel_groups_of_every_family_are_found(family: str, make_model: MakeModel, batch: Inputs) -> None:
    model = plain(family, make_model)
    patterns, _ = choose_patterns(model, Layers(), "2:4")
    groups, skipped = find_channel_groups(model, inputs_for(family, batch), patterns)
    assert len(groups) == len(GROUPS[family]) * (1 if family == "albert" else 2)
    for group, (reads, makes, layout) in zip(groups, GROUPS[family] * 2, strict=False):
        assert group.consumer.endswith(f".{reads}")
        assert len(group.producers) == len(makes.split())
        assert all(name.endswith(f".{end}") for name, end in zip(group.producers, makes.split(), strict=True))
        assert (group.heads, group.parts, group.moved) == layout
    assert sorted([*skipped, *(group.consumer for group in groups)]) == sorted(patterns)
    assert set(skipped.values()) == {"no linear of its block computes them in any order"}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_permuted_dense_model_is_the_original(family: str, make_model: MakeModel, batch: Inputs) -> None:
    inputs, model = inputs_for(family, batch), plain(family, make_model)
    precise = copy.deepcopy(model).double()
    for network, close in ((precise, 1e-13), (model, 1e-5)):
        before = [p.detach().clone() for p in network.parameters()]
        outputs = run_model(network, inputs)
        notes = permuted(network, inputs)
        assert notes[0].startswith(
            f"permuted the channels of {len(GROUPS[family]) * (1 if family == 'albert' else 2)} groups"
        )
        assert relative_change(outputs, run_model(network, inputs)) < close
        moved = [name for old, (name, new) in zip(before, network.named_parameters(), strict=True)
                 if not torch.equal(old, new)]  # fmt: skip
        assert len(moved) >= 2 * len(GROUPS[family]), "it is another order"
        assert all(torch.equal(old.flatten().sort().values, new.flatten().sort().values)
                   for old, new in zip(before, network.parameters(), strict=True)), "of the same weights"  # fmt: skip


def test_each_layer_keeps_more_and_the_others_as_much(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert")
    patterns, _ = choose_patterns(model, Layers(), "2:4")

    def kept() -> dict[str, float]:
        return {
            name: sum_kept_scores(model.get_submodule(name).weight.detach().abs(), TWO_OF_FOUR) for name in patterns
        }

    before, again = kept(), copy.deepcopy(model)
    consumers = {group.consumer for group in find_channel_groups(model, batch, patterns)[0]}
    notes, after = permuted(model, batch), kept()
    for name in patterns:
        assert after[name] > 1.01 * before[name] if name in consumers else after[name] == pytest.approx(before[name])
    whole = sum(float(model.get_submodule(name).weight.detach().double().abs().sum()) for name in consumers)
    old, new = (sum(each[name] for name in consumers) / whole for each in (before, after))
    assert notes == [
        "permuted the channels of 4 groups: "
        f"the layers that read them keep {old:.1%} -> {new:.1%} of their magnitude scores",
        "not permuted: the inputs of 8 layers, bert.encoder.layer.0.attention.self.query, "
        "bert.encoder.layer.0.attention.self.key, bert.encoder.layer.0.attention.self.value and others: "
        "no linear of its block computes them in any order",
    ]
    assert permuted(again, batch) == notes
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)), (
        "always the same"
    )


class Gated(nn.Module):
    """Grouped attention (4 heads, 2 of keys and values) and a gated feed-forward network of two producers."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o, self.gate, self.up, self.down = (nn.Linear(*s) for s in ((32, 32), (32, 64), (32, 64), (64, 32)))
        self.norm = nn.LayerNorm(64) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        x = x + self.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return x + self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class Stack(nn.Module):
    """Blocks that read ``x``; a config that tells their heads."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.config = type("Config", (), {"num_attention_heads": 4})()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"y": x}


X = {"x": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))}
LINEARS = dict.fromkeys(("blocks.0.o", "blocks.0.down"), TWO_OF_FOUR)


def test_heads_that_share_values_and_gates_share_their_order() -> None:
    model = Stack(Gated())
    groups, skipped = find_channel_groups(model, X, LINEARS)
    assert skipped == {}
    assert groups == [
        ChannelGroup("blocks.0.o", ("blocks.0.v",), heads=2, repeats=2, width=8),
        ChannelGroup("blocks.0.down", ("blocks.0.up", "blocks.0.gate"), heads=1, repeats=1, width=64),
    ]
    before = run_model(model, X)
    permute_(model, X, LINEARS, Magnitude(), collect_nothing)
    assert relative_change(before, run_model(model, X)) < 1e-5


def test_a_norm_that_scales_channels_differently_stops_a_group() -> None:
    model = Stack(Gated(norm=True))
    assert [group.consumer for group in find_channel_groups(model, X, LINEARS)[0]] == ["blocks.0.o", "blocks.0.down"], (
        "all alike"
    )
    nn.init.normal_(model.blocks[0].norm.weight)
    groups, skipped = find_channel_groups(model, X, LINEARS)
    assert [group.consumer for group in groups] == ["blocks.0.o"]
    assert skipped == {"blocks.0.down": "no linear of its block computes them in any order"}


def test_shared_weights_and_pruned_layers_stay(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert")
    first, second = (block.intermediate.dense for block in model.bert.encoder.layer)
    first.weight = second.weight
    patterns, _ = choose_patterns(model, Layers(), "2:4")
    masked = {"bert.encoder.layer.1.attention.self.value": "it has a mask already"}
    groups, skipped = find_channel_groups(model, batch, patterns, masked)
    assert [group.consumer for group in groups] == ["bert.encoder.layer.0.attention.output.dense"]
    layers = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    for one, other in (layers, layers[::-1]):
        shared = f"shares a weight with {other}.intermediate.dense"
        assert skipped[f"{one}.output.dense"] == f"intermediate.dense: {shared}"
        assert skipped[f"{one}.intermediate.dense"] == shared
    assert skipped[f"{layers[1]}.attention.output.dense"] == "attention.self.value: it has a mask already"


def test_heads_of_one_group_leave_no_choice(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert", num_attention_heads=8)
    groups, skipped = find_channel_groups(model, batch, choose_patterns(model, Layers(), "2:4")[0])
    assert [group.consumer[-12:] for group in groups] == ["output.dense"] * 2
    assert skipped["bert.encoder.layer.0.attention.output.dense"] == "4 channels a head leave no choice of groups of 4"
    patterns = choose_patterns(make_model("bert"), Layers(), "8:16")[0]
    _, skipped = find_channel_groups(make_model("bert"), batch, patterns)
    assert (
        skipped["bert.encoder.layer.0.attention.output.dense"] == "16 channels a head leave no choice of groups of 16"
    )


def test_a_model_without_blocks_has_no_group() -> None:
    net = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
    groups, skipped = find_channel_groups(
        net, {"input": torch.zeros(1, 16, 4, 4)}, {"1": TWO_OF_FOUR, "2": TWO_OF_FOUR}
    )
    assert groups == []
    assert skipped == dict.fromkeys("12", "it is in no encoder block that ran")


def test_a_block_that_does_not_run_in_float64_has_no_group() -> None:
    class Single(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    groups, skipped = find_channel_groups(Stack(Single()), X, LINEARS)
    assert groups == []
    assert all(reason.startswith("its block does not run in float64: ") for reason in skipped.values())


def test_an_order_that_changes_the_outputs_is_undone(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert")

    def read(module: nn.Module, args: object, output: Any) -> None:
        """What happens outside the block depends on the order inside it."""
        output.logits.add_(model.bert.encoder.layer[0].intermediate.dense.bias @ torch.arange(64.0))

    handle = model.register_forward_hook(read)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with raises_code("unsupported-model"):
        permuted(model, batch)
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_infinite_scores_are_an_error(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert")
    patterns, _ = choose_patterns(model, Layers(), "2:4")

    def squares(owners: dict[str, str]) -> dict[str, Tensor]:
        return {name: torch.full((model.get_submodule(name).in_features,), torch.inf) for name in owners}

    with raises_code("non-finite"):
        permute_(model, batch, patterns, Wanda(), squares)


def test_sparsegpt_orders_by_wandas_scores() -> None:
    x = torch.randn(10, 8)
    weight = torch.randn(4, 8)
    torch.testing.assert_close(SparseGPT().score(weight, x.T @ x), Wanda().score(weight, x.square().sum(0)))
    assert (SparseGPT().score_name, Magnitude().score_name) == ("wanda", "magnitude")


def record_qkv(model: nn.Module, inputs: Inputs) -> QKV:
    """q, k and v of the last block."""
    seen: dict[str, Tensor] = {}
    names = find_qkv(model)
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: seen.__setitem__(n, y.double()))
        for n in names
    ]
    run_model(model, inputs)
    for hook in hooks:
        hook.remove()
    return QKV(*(seen[name] for name in names), heads=2)


@pytest.mark.parametrize("loss", [MiniLMv1(), MiniLMv2(), MiniLMv2(relation_heads=1)])
def test_value_relations_ignore_the_order_within_a_head(
    loss: RelationLoss, make_model: MakeModel, batch: Inputs
) -> None:
    student, teacher = make_model("bert").double(), make_model("bert").double()
    permuted(student, batch)
    values = find_qkv(student)[2]
    assert not torch.equal(student.get_submodule(values).weight, teacher.get_submodule(values).weight)
    assert abs(float(loss(record_qkv(student, batch), record_qkv(teacher, batch), batch["attention_mask"]))) < 1e-12
    assert fixed_by_relation_heads(student, loss.relation_heads, None) == {}


def test_relation_heads_that_split_a_head_fix_its_values(make_model: MakeModel, batch: Inputs) -> None:
    student, teacher, loss = make_model("bert").double(), make_model("bert").double(), MiniLMv2(relation_heads=4)
    fixed = fixed_by_relation_heads(student, loss.relation_heads, None)
    assert list(fixed) == list(find_qkv(student))
    notes = permuted(student, batch, fixed=fixed)
    assert notes[-1].endswith("attention.self.value: distillation compares it in 4 relation heads")
    assert abs(float(loss(record_qkv(student, batch), record_qkv(teacher, batch), batch["attention_mask"]))) < 1e-12
    free = make_model("bert").double()
    permuted(free, batch)
    assert float(loss(record_qkv(free, batch), record_qkv(teacher, batch), batch["attention_mask"])) > 1e-6


def test_the_inverse_order_undoes_a_reordering() -> None:
    model = Stack(Gated())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for group in find_channel_groups(model, X, LINEARS)[0]:
        order = torch.stack([torch.randperm(group.width) for _ in range(group.heads)])
        reorder_(model, group, order)
        reorder_(model, group, order.argsort(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_stage_reads_its_first_rows_without_a_trace(make_model: MakeModel, batch: Inputs) -> None:
    model = make_model("bert").train()
    read: list[list[int]] = []

    def collate(rows: list[int]) -> Batch:
        read.append(rows)
        torch.rand(3)  # a processor may draw
        return Batch({name: x[rows] for name, x in batch.items()}, torch.zeros(len(rows)), torch.zeros(len(rows)))

    state = torch.get_rng_state()
    inputs = example_inputs(model, Batches(lambda epoch: [[2, 0], [1]], collate), 0)
    assert torch.equal(inputs["input_ids"], batch["input_ids"][[2, 0]])
    assert read == [[2, 0]]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_layers_with_one_reason_share_a_note(make_model: MakeModel, batch: Inputs) -> None:
    notes = permuted(make_model("bert"), batch, fixed={"bert.encoder.layer.0.output.dense": "so"})
    assert notes[2] == "not permuted: the inputs of 1 layers, bert.encoder.layer.0.output.dense: so"
    assert all(a != b for a, b in pairwise(notes))
