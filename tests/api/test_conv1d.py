"""GPT-2's Conv1D in a training loop of one's own: linears meanwhile, afterwards Conv1D of the same parameters."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Conv1D

import sqat
from sqat.sparsity.masks import nm_mask
from sqat.sparsity.pattern import Pattern
from tests.api.conftest import Batches, train
from tests.tiny import MakeModel

SQUARE = "transformer.h.0.attn.c_proj"  # a transposition by mistake would not be seen in its shape


@pytest.fixture
def gpt2(make_model: MakeModel) -> Any:
    return make_model("gpt2")


def conv1d_of(model: Any) -> dict[str, Conv1D]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(state) == set(other) and all(torch.equal(state[name], other[name]) for name in state)


def test_prune_keeps_two_of_four_along_the_inputs(gpt2: Any) -> None:
    before, parameters = deepcopy(gpt2.state_dict()), dict(gpt2.named_parameters())
    masks = sqat.prune(gpt2)
    assert set(masks.kept) == set(conv1d_of(gpt2))
    for name, mask in masks.kept.items():
        weight = before[f"{name}.weight"]
        assert torch.equal(mask, nm_mask(weight.t().abs(), Pattern(2, 4)))
        assert torch.equal(gpt2.get_submodule(name).weight, weight * mask.t())
    assert all(parameter is parameters[name] for name, parameter in gpt2.named_parameters())


@pytest.mark.parametrize("change", ["masked", "quantized", "pruner"])
def test_training_goes_on_with_the_optimizer_of_before(
    gpt2: Any, batches: Batches, tmp_path: Path, change: str
) -> None:
    """A model that is saved in the block is read by transformers and equals the one after the block."""
    optimizer = torch.optim.SGD(gpt2.parameters(), lr=0.1, momentum=0.9)
    dense = gpt2.get_submodule(SQUARE).weight.detach().clone()
    if change == "pruner":
        block: Any = sqat.Pruner(gpt2, 4, recovery_fraction=0.25)
        for _ in range(4):
            block.step()
    else:
        masks = sqat.prune(gpt2)
        block = sqat.masked(gpt2, masks)
        if change == "quantized":
            block = sqat.quantized(gpt2, masks, sqat.calibrate(gpt2, batches))
    with block:
        train(gpt2, batches, optimizer)
        gpt2.save_pretrained(tmp_path)
        assert not any(gpt2.load_state_dict(deepcopy(gpt2.state_dict())))
    weight = gpt2.get_submodule(SQUARE).weight
    assert isinstance(gpt2.get_submodule(SQUARE), Conv1D)
    assert float((weight == 0).float().mean()) == 0.5
    assert float((weight != dense)[weight != 0].float().mean()) > 0.9
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert equal(loaded.state_dict(), gpt2.state_dict())


def test_distillation_and_export_take_it(gpt2: Any, batches: Batches, tmp_path: Path) -> None:
    teacher = deepcopy(gpt2)
    state = deepcopy(teacher.state_dict())
    masks, scales = sqat.prune(gpt2), sqat.calibrate(gpt2, batches)
    with sqat.quantized(gpt2, masks, scales), sqat.distillation_loss(gpt2, teacher) as loss:
        gpt2(**batches[0])
        loss(batches[0]).backward()
        assert gpt2.get_submodule(SQUARE).parametrizations.weight.original.grad is not None
    assert equal(teacher.state_dict(), state)
    before = deepcopy(gpt2.state_dict())
    assert sqat.export_onnx(gpt2, tmp_path / "model.onnx", batches[0], masks, scales) < 0.05
    assert equal(gpt2.state_dict(), before)


def test_a_refused_model_is_as_it_was(gpt2: Any) -> None:
    before = deepcopy(gpt2.state_dict())
    with pytest.raises(sqat.SqatError):
        sqat.Pruner(gpt2, 4, include=["no.such.layer"])
    with pytest.raises(ValueError, match="steps"):
        sqat.Pruner(gpt2, 0)
    assert len(conv1d_of(gpt2)) == 4 * gpt2.config.n_layer
    assert equal(gpt2.state_dict(), before)
