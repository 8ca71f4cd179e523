"""`sqat.distillation_loss` in a training loop."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import sqat
from sqat.distillation.minilm_v2 import MiniLMv2
from sqat.distillation.relations import QKV
from sqat.errors import ErrorCode
from tests.api.conftest import Batches
from tests.errors import raises_code
from tests.tiny import MakeModel


def relations(model: Any, batch: dict[str, Tensor]) -> QKV:
    """Q, k and v of the last block, without sqat."""
    layer = model.bert.encoder.layer[-1].attention.self
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-2]
        return QKV(layer.query(hidden), layer.key(hidden), layer.value(hidden), layer.num_attention_heads)


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for network in models for module in network.modules())


def test_the_distillation_loss_is_that_of_both_models_projections(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    sqat.prune(model)
    for network in (model, teacher):
        relations(network, batches[0])  # transformers puts hooks of its own on a model that is asked for hidden states
    before = hooks(model, teacher)
    with sqat.distillation_loss(model, teacher) as minilm:
        assert hooks(model, teacher) == before + 6
        model(**batches[0])
        loss = minilm(batches[0])
        expected = MiniLMv2()(*(relations(network, batches[0]) for network in (model, teacher)),
                            batches[0]["attention_mask"])  # fmt: skip
        model(**batches[0])
        minilm(batches[0]).backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert float(loss.detach()) > 0.01
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert hooks(model, teacher) == before


def test_training_with_it_brings_the_student_closer(model: Any, batches: Batches) -> None:
    teacher = copy.deepcopy(model)
    masks = sqat.prune(model)
    with sqat.masked(model, masks), sqat.distillation_loss(model, teacher, "minilm-v1") as minilm:
        losses = []
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(8):
            model(**batches[0])
            loss = minilm(batches[0])
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_a_function_is_a_loss(model: Any, batches: Batches) -> None:
    def values(student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
        return (student.value - teacher.value).square()[attention_mask.bool()].mean()

    teacher = copy.deepcopy(model)
    sqat.prune(model)
    with sqat.distillation_loss(model, teacher, values) as distil:
        model(**batches[1])
        found = distil(batches[1])
        student, teacher_qkv = (relations(network, batches[1]) for network in (model, teacher))
    real = batches[1]["attention_mask"].bool()
    torch.testing.assert_close(found.detach(), (student.value - teacher_qkv.value)[real].square().mean())


def test_wrong_arguments_of_distillation_are_refused(model: Any, make_model: MakeModel, batches: Batches) -> None:
    def refused(code: ErrorCode, *arguments: Any) -> None:
        with raises_code(code), sqat.distillation_loss(model, *arguments) as minilm:
            minilm(batches[0])

    teacher = make_model(num_attention_heads=4)
    refused("usage", teacher)  # the student has not seen the batch
    refused("unsupported-model", teacher, "minilm-v1")  # head counts differ
    refused("usage", model)
    refused("usage", copy.deepcopy(model).train())
    refused("unknown-name", teacher, "minilm-v3")
    assert hooks(model, teacher) == 0
