"""Which q, k and v MiniLM compares: those of the tokens, whatever a family's layout, or a refusal by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sqat
from scripts.families.registry import FAMILIES
from scripts.families.source import build_family
from sqat.compress.training_losses import batch_shape, minilm_loss
from sqat.distillation import MiniLMv1, MiniLMv2
from sqat.distillation.relations import QKV
from sqat.models.attention import attention_heads, hook_last_qkv, token_multiple
from sqat.models.layer_selection import find_qkv
from tests.errors import raises_code

# Post-norm encoders: q, k and v of the last layer read the hidden states before it.
ENCODERS = {"bert": (), "deberta-v2": (), "deberta-v3": (), "longformer": (), "convbert": (), "luke": (), "xmod": ()}
LOSSES = [MiniLMv1(), MiniLMv2(), MiniLMv2(relation_heads=4)]


def texts(lengths: list[int], tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 40, (len(lengths), tokens), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


BATCHES = {
    "three texts": texts([12, 9, 5], 12),
    "as many texts as tokens": texts([8, 7, 6, 5, 4, 3, 2, 8], 8),
    "one text": texts([9], 9),
    "as many texts as filled-up tokens": texts([7, 7, 6, 5, 4, 3, 2, 7], 7),
}


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher with other weights."""
    return build_family(FAMILIES[name]), build_family(FAMILIES[name], seed=1)


def projections(model: Any, batch: dict[str, Tensor]) -> QKV:
    """Q, k and v of the last layer from the hidden states before it, without sqat."""
    names = find_qkv(model)
    before = model(**batch, output_hidden_states=True).hidden_states[-2][:, : batch["input_ids"].shape[1]]
    query, key, value = (model.get_submodule(name)(before) for name in names)
    return QKV(query, key, value, attention_heads(model, names[0]))


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", ENCODERS)
def test_q_k_and_v_are_those_of_the_tokens(name: str, batch: dict[str, Tensor]) -> None:
    model = build_family(FAMILIES[name])
    with torch.no_grad():
        wanted = projections(model, batch)
        hooks = hook_last_qkv(model)
        model(**batch)
        caught = hooks.pop(*batch_shape(batch))
        hooks.remove()
    real = batch["attention_mask"].bool()
    names = find_qkv(model)
    for role, name_ in zip(("query", "key", "value"), names, strict=True):
        if name == "convbert" and role != "value":  # its keys come from a convolution, of no linear's name
            assert getattr(caught, role).shape == getattr(wanted, role).shape
            continue
        torch.testing.assert_close(getattr(caught, role)[real], getattr(wanted, role)[real], msg=name_)
    assert caught.heads == wanted.heads


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.relation_heads}")
@pytest.mark.parametrize("name", ["deberta-v3", "longformer", "bert"])
def test_the_loss_is_that_of_the_projections(name: str, loss: Any) -> None:
    student, teacher = pair(name)
    batch = BATCHES["three texts"]
    with torch.no_grad():
        wanted = loss(projections(student, batch), projections(teacher, batch), batch["attention_mask"])
    with sqat.distillation_loss(student, teacher, loss) as minilm:
        student(**batch)
        found = minilm(batch)
    torch.testing.assert_close(found.detach(), wanted)
    assert float(found.detach()) > 1e-3


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_quantizers_do_not_hide_the_layout(placement: Any) -> None:
    """A fake quantizer returns a tensor that lies in memory as it likes."""
    model, batch = build_family(FAMILIES["longformer"]), BATCHES["as many texts as tokens"]
    scales = sqat.calibrate(model, [batch], placement=placement)
    with sqat.quantized(model, None, scales), torch.no_grad():
        hooks, seen = hook_last_qkv(model), []
        handle = model.get_submodule(find_qkv(model)[0]).register_forward_hook(
            lambda *call: seen.append(call[2].clone())
        )
        model(**batch)
        assert torch.equal(hooks.pop(8, 8).query, seen[0].transpose(0, 1))
        hooks.remove()
        handle.remove()


@pytest.mark.parametrize(
    ("name", "heads"),
    [("siglip", 2), ("clip", 2), ("swin", 2), ("hiera", 2), ("vit", 2), ("distilbert", 2), ("convbert", 1),
     ("gpt_neo", 2), ("mpt", 2), ("llama", 4), ("gemma2", 4), ("mobilebert", 2), ("modernbert", 2)],
)  # fmt: skip
def test_heads_are_those_of_the_module_or_of_its_configuration(name: str, heads: int) -> None:
    model = build_family(FAMILIES[name])
    assert attention_heads(model, find_qkv(model)[0]) == heads
    student, teacher = pair(name)
    shape = FAMILIES[name].side
    batch = {"pixel_values": torch.randn(3, 3, shape, shape)} if shape else BATCHES["three texts"]
    for loss in LOSSES[:2]:
        with sqat.distillation_loss(student, teacher, loss) as minilm:
            student(**batch)
            found = minilm(batch)
        found.backward()
        assert torch.isfinite(found)
        assert float(found.detach()) > 0
    gradient = student.get_submodule(find_qkv(student)[0]).weight.grad
    assert gradient is not None
    assert gradient.any()


class Tail(nn.Module):
    """Two blocks of q, k and v, of which one part is never run or lies otherwise."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"n_head": 2})()
        self.change = change
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")}) for _ in range(2)
        )

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = inputs_embeds
        for block in self.blocks:
            if self.change == "prefixed":
                block["query"](torch.cat([x[:, :1], x], 1))
            elif self.change == "flat":
                block["query"](x.flatten(0, 1))
            elif self.change != "unused":
                block["query"](x)
            with torch.set_grad_enabled(self.change != "detached"):
                x = block["key"](x) + block["value"](x) if self.change != "halved" else block["key"](x) + x
        return x


@pytest.mark.parametrize("change", ["prefixed", "flat", "unused", "halved"])
def test_a_linear_that_does_not_run_on_the_tokens_is_refused_by_name(change: str) -> None:
    student, teacher = Tail(change), Tail("").eval()
    batch = {"inputs_embeds": torch.randn(3, 5, 8), "attention_mask": torch.ones(3, 5)}
    part = "value" if change == "halved" else "query"
    with (
        raises_code("unsupported-model", match=rf"Tail: .*\[3, 5, width\] from blocks\.1\.{part}.*minilm_weight: 0"),
        sqat.distillation_loss(student, teacher) as minilm,
    ):
        student(**batch)
        minilm(batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_projections_without_a_gradient_are_refused() -> None:
    student, teacher = build_family(FAMILIES["reformer"]), build_family(FAMILIES["reformer"], seed=1)
    batch = BATCHES["three texts"]
    with (
        raises_code("unsupported-model", match="ReformerForSequenceClassification.*without a gradient"),
        sqat.distillation_loss(student, teacher) as minilm,
    ):
        student(**batch)
        minilm(batch)
    with torch.no_grad(), sqat.distillation_loss(student, teacher) as minilm:
        student(**batch)
        assert float(minilm(batch)) > 0  # to watch it is allowed


@pytest.mark.parametrize("loss", LOSSES[:2], ids=lambda loss: loss.name)
@pytest.mark.parametrize(
    ("name", "told"),
    [("canine", "CanineForSequenceClassification.*self.query"), ("perceiver", "Perceiver.*self.query"),
     ("convnext", "needs attention"), ("resnet", "needs attention"), ("xlnet", "q, k and v"), ("fnet", "q, k and v")],
)  # fmt: skip
def test_a_family_without_q_k_and_v_of_tokens_is_refused_with_what_to_do(name: str, told: str, loss: Any) -> None:
    student, teacher = pair(name)
    side = FAMILIES[name].side
    batch = {"pixel_values": torch.randn(3, 3, side, side)} if side else BATCHES["three texts"]
    with (
        raises_code("unsupported-model", match=rf"{told}.*distill: {{minilm_weight: 0}}"),
        minilm_loss(student, teacher, loss) as minilm,
    ):
        student(**batch)
        teacher(**batch)
        minilm(batch)


def test_a_second_pass_before_the_loss_counts_alone() -> None:
    student, teacher = pair("deberta-v3")
    first, second = BATCHES["three texts"], BATCHES["one text"]
    with sqat.distillation_loss(student, teacher) as minilm:
        student(**second)
        alone = minilm(second).detach()
        student(**first)  # a look at other rows in between
        student(**second)
        assert torch.equal(minilm(second).detach(), alone)
        with raises_code("usage"):
            minilm(second)


def test_texts_are_filled_up_as_the_configuration_says() -> None:
    model = copy.deepcopy(build_family(FAMILIES["longformer"]))
    assert token_multiple(model) == 8
    model.config.attention_window = [8, 16]
    assert token_multiple(model) == 16
    assert token_multiple(build_family(FAMILIES["big_bird"])) == 1
    sparse = build_family(FAMILIES["big_bird"])
    sparse.config.attention_type = "block_sparse"
    assert token_multiple(sparse) == 4
    assert token_multiple(nn.Linear(2, 2)) == 1


def test_heads_that_nothing_tells_are_refused() -> None:
    model = Tail("")
    del model.config
    with raises_code("unsupported-model", match=r"Tail: the number of attention heads of blocks\.1\.query"):
        hook_last_qkv(model)
