"""Layers that no forward pass calls, and sites that see nothing but zeros."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sqat
from sqat.compress.idle_layers import find_idle_layers
from tests.tiny import SHAPE, MakeModel, random_batch

LUKE = {**SHAPE, "vocab_size": 65, "entity_vocab_size": 8, "entity_emb_size": 16, "pad_token_id": 0}


class Branches(nn.Module):
    """A layer that runs, one that does not, one whose weight alone is used, one that a mode chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.weight_only = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.training_only = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> SimpleNamespace:
        x = nn.functional.linear(self.used(x), self.weight_only.weight)
        return SimpleNamespace(logits=self.training_only(x) if self.training else x)


def luke() -> nn.Module:
    return transformers.LukeForSequenceClassification(transformers.LukeConfig(**LUKE))


@pytest.mark.parametrize(("build", "inputs", "endings"), [
    (Branches, {"x": torch.ones(2, 16)}, {"unused", "weight_only", "training_only"}),
    (luke, random_batch(), {"w2e_query", "e2w_query", "e2e_query", "entity_embedding_dense"}),
])  # fmt: skip
def test_layers_that_a_batch_never_calls(
    build: Callable[[], Any], inputs: dict[str, Tensor], endings: set[str]
) -> None:
    model = build().train()
    assert {name.rpartition(".")[2] for name in find_idle_layers(model, inputs)} == endings
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_they_stay_as_they_are_and_say_why() -> None:
    model, batches = luke().eval(), [random_batch(seed) for seed in (1, 2)]
    masks = sqat.prune(model, batches=batches)
    scales = sqat.calibrate(model, batches)
    for skipped, treated in ((masks.skipped, set(masks.kept)), (scales.skipped, set(scales.layers))):
        idle = {name for name, reason in skipped.items() if reason == "its forward is never called"}
        assert {name.rpartition(".")[2] for name in idle} == {"w2e_query", "e2w_query", "e2e_query"}
        assert len(treated) == 12
        assert not treated & idle


def test_a_site_of_zeros_has_a_scale(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1)
    dense = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    scales = sqat.calibrate(model, [random_batch()], "max")
    assert scales.amax["bert.encoder.layer.0.output.dense:input"] == 1.0
    with sqat.quantized(model, None, scales):
        assert bool(model(**random_batch()).logits.isfinite().all())
