"""A model and batches for a training loop, and what the tests of `sqat.api` ask of a pruned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqat
from tests.tiny import VOCABULARY, MakeModel

Batches = list[dict[str, Tensor]]


@pytest.fixture
def model(make_model: MakeModel) -> Any:
    return make_model()


@pytest.fixture(scope="session")
def batches() -> Batches:
    """Four batches with labels and padding."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(4):
        ids = torch.randint(5, len(VOCABULARY), (4, 8), generator=draw)
        mask = (torch.arange(8) < torch.tensor([8, 6, 8, 3])[:, None]).long()
        labels = torch.randint(0, 2, (4,), generator=draw)
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return found


def copy_weights(model: nn.Module, masks: sqat.Masks) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in masks.kept}


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_pruned(model: nn.Module, masks: sqat.Masks) -> None:
    """Plain parameters, 2:4 as counted by hand, pruned weights +0.0."""
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    for name, mask in masks.kept.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        assert bool((weight.detach().reshape(-1, 4).count_nonzero(1) <= 2).all())
        assert bool((weight[~mask].signbit() == 0).all())
        assert int((weight[~mask] != 0).sum()) == 0


def train(model: nn.Module, batches: Batches, optimizer: Any = None) -> None:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
