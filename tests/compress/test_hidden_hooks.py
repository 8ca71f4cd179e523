"""Which hidden states are compared: those that transformers calls so, whatever the family, or a refusal by name."""

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
from sqat.modules.hidden_hooks import HiddenHooks
from tests.errors import raises_code
from tests.tiny import build_model, random_batch

HIDDEN = {"minilm_weight": 0.0, "hidden_weight": 1.0}
TEXTS = {name: value % 40 for name, value in random_batch().items()}  # families have few words
# Each has its block's output as hidden state; True: but for the last, which it normalizes again.
NORMALIZED_LAST = {"bert": False, "distilbert": False, "albert": False, "longformer": False, "deberta-v3": False,
                   "gpt2": True, "llama": True, "vit": False}  # fmt: skip


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher with other weights."""
    return build_family(FAMILIES[name]), build_family(FAMILIES[name], seed=1)


def batch_of(name: str) -> dict[str, Tensor]:
    """Texts with padding, or images."""
    side = FAMILIES[name].side
    return {"pixel_values": torch.randn(3, 3, side, side)} if side else TEXTS


def loss_by_hand(student: Any, teacher: Any, batch: dict[str, Tensor], last: slice) -> float:
    """The loss from what transformers calls hidden states."""
    total = 0.0
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True).hidden_states[1:][last] for model in (student, teacher)]
    for x, y in zip(*outputs, strict=True):
        if "attention_mask" in batch:
            real = batch["attention_mask"].bool()
            x, y = (each[:, : real.shape[1]][real] for each in (x, y))
        total += float((x.double() - y.double()).pow(2).mean() / y.double().pow(2).mean())
    return total


@pytest.mark.parametrize("name", NORMALIZED_LAST)
def test_hidden_states_are_those_of_transformers(name: str) -> None:
    student, teacher = pair(name)
    batch = batch_of(name)
    last = slice(None, -1) if NORMALIZED_LAST[name] else slice(None)
    with sqat.distillation_loss(student, teacher, **HIDDEN) as distil, torch.no_grad():
        student(**batch)
        found = float(distil(batch))
    if NORMALIZED_LAST[name]:  # the last block's own part, from hooks of this test
        found -= last_part(student, teacher, batch)
    assert found == pytest.approx(loss_by_hand(student, teacher, batch, last), rel=1e-4)
    assert found > 1e-3


def last_part(student: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    """The part of the loss that the last block has."""
    outputs: list[Tensor] = []
    for model in (student, teacher):
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        handle = blocks[-1].register_forward_hook(
            lambda *call: outputs.append(call[2][0] if isinstance(call[2], tuple) else call[2])
        )
        with torch.no_grad():
            model(**batch)
        handle.remove()
    real = batch["attention_mask"].bool()
    x, y = (each[real].double() for each in outputs)
    return float((x - y).pow(2).mean() / y.pow(2).mean())


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_training_with_it_brings_the_student_closer(name: str) -> None:
    teacher, batch = build_family(FAMILIES[name]), batch_of(name)
    student = copy.deepcopy(teacher)
    masks = sqat.prune(student)
    with sqat.masked(student, masks), sqat.distillation_loss(student, teacher, **HIDDEN) as distil:
        optimizer, losses = torch.optim.Adam(student.parameters(), lr=2e-3), []
        for _ in range(8):
            student(**batch)
            loss = distil(batch)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_both_parts_are_summed_by_their_weights() -> None:
    teacher, batch = build_model(), TEXTS
    student = copy.deepcopy(teacher)
    sqat.prune(student)
    found = {}
    for minilm, hidden in ((1.0, 0.0), (0.0, 1.0), (2.0, 0.5)):
        with sqat.distillation_loss(student, teacher, minilm_weight=minilm, hidden_weight=hidden) as distil:
            student(**batch)
            found[minilm, hidden] = float(distil(batch).detach())
    assert found[2.0, 0.5] == pytest.approx(2 * found[1.0, 0.0] + 0.5 * found[0.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    teacher = build_model()
    plain = build_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    sqat.prune(plain)
    student = copy.deepcopy(plain)
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, student):
        with sqat.distillation_loss(model, teacher, **HIDDEN) as distil:
            model(**TEXTS)
            distil(TEXTS).backward()
    for (name, mine), other in zip(plain.named_parameters(), student.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        assert mine.grad is None or torch.allclose(mine.grad, other.grad, atol=1e-7), name
    assert plain.bert.encoder.layer[0].output.dense.weight.grad.any()


@pytest.mark.parametrize(("name", "told"), [("reformer", "without a gradient"), ("funnel", "never called"),
                                            ("xlnet", r"\[12, 3, 32\]"), ("perceiver", r"\[3, 8, 32\]")])  # fmt: skip
def test_families_without_hidden_states_of_the_tokens_are_refused(name: str, told: str) -> None:
    student, teacher = pair(name)
    with (
        raises_code("unsupported-model", match=rf"ForSequenceClassification.*{told}.*hidden_weight"),
        sqat.distillation_loss(student, teacher, **HIDDEN) as distil,
    ):
        student(**TEXTS)
        distil(TEXTS)


class Writing(nn.Module):
    """Two blocks, between which the model writes into what the first returned."""

    def __init__(self, shape: str = "") -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = self.blocks[0](inputs_embeds.transpose(0, 1) if self.shape == "time first" else inputs_embeds)
        if self.shape != "one block":
            x += 1
            x = self.blocks[1](x)
        return x


def test_a_model_may_write_into_its_hidden_states() -> None:
    model, batch = Writing(), torch.randn(2, 3, 8)
    hooks = HiddenHooks(model, ["blocks.0", "blocks.1"])
    with torch.no_grad():
        out = model(batch)
        first, second = hooks.pop(2, 3)
    hooks.remove()
    torch.testing.assert_close(first, batch @ model.blocks[0].weight.T + model.blocks[0].bias)
    assert torch.equal(second, out)


@pytest.mark.parametrize("shape", ["time first", "one block"])
def test_hidden_states_that_do_not_fit_are_refused_by_name(shape: str) -> None:
    student, teacher, batch = Writing(shape), Writing().eval(), {"inputs_embeds": torch.randn(2, 3, 8)}
    told = {"time first": r"\[2, 3, width\] are needed from block 0, which returned \[3, 2, 8\]",
            "one block": "got 1 in the student and 2 in the teacher"}[shape]  # fmt: skip
    with (
        raises_code("unsupported-model", match=told),
        sqat.distillation_loss(student, teacher, **HIDDEN) as distil,
    ):
        student(**batch)
        distil(batch)


def test_wrong_arguments_are_refused() -> None:
    student, teacher = pair("bert")
    convolutions = pair("resnet")
    with raises_code("unsupported-model", match="no blocks"), sqat.distillation_loss(*convolutions, **HIDDEN):
        pass
    with raises_code("usage"), sqat.distillation_loss(student, teacher, **HIDDEN) as distil:
        distil(TEXTS)
    for weights in ({"hidden_weight": -1.0}, {"hidden_weight": float("nan")}, {"minilm_weight": 0.0}):
        with raises_code("usage"), sqat.distillation_loss(student, teacher, **weights):
            pass
    with (
        raises_code("unsupported-model", match="equal shapes"),
        sqat.distillation_loss(student, build_model(hidden_size=48), **HIDDEN) as distil,
    ):
        student(**TEXTS)
        distil(TEXTS)
