"""State dicts of a model with masks and quantizers on it: plain names, pruned values, and read back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import sqat
from sqat.modules.activation_quantizers import QUANTIZERS
from tests.tiny import VOCABULARY, MakeModel

FIRST = "bert.encoder.layer.0.attention.self.query"
Change = Callable[[Any], AbstractContextManager[object]]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, len(VOCABULARY), (4, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def masked(model: Any) -> AbstractContextManager[object]:
    return sqat.masked(model, sqat.prune(model))


def quantized(placement: str, sparse: bool) -> Change:
    def change(model: Any) -> AbstractContextManager[object]:
        masks = sqat.prune(model) if sparse else None
        return sqat.quantized(model, masks, sqat.calibrate(model, [batch()], placement=placement))  # type: ignore[arg-type]

    return change


def pruning(steps: int) -> Change:
    def change(model: Any) -> AbstractContextManager[object]:
        pruner = sqat.Pruner(model, 10, recovery_fraction=0.5)
        for _ in range(steps):
            pruner.step()
        pruner.finish = lambda: pruner.remove()  # type: ignore[assignment,method-assign,return-value]
        return pruner

    return change


CHANGES: dict[str, Change] = {
    "masked": masked,
    "sparse int8": quantized("linear", sparse=True),
    "dense int8": quantized("linear", sparse=False),
    "tensorrt": quantized("tensorrt", sparse=True),
    "cpu": quantized("cpu", sparse=True),
    "pruned in part": pruning(4),
    "pruned": pruning(8),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
def test_a_saved_model_is_read_by_transformers(make_model: MakeModel, tmp_path: Path, change: Change) -> None:
    """It holds what the model holds after the block: the same names, the same values."""
    model = make_model()
    with change(model):
        model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    plain = model.state_dict()
    assert set(loaded.state_dict()) == set(plain)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in plain.items())


@changes
def test_a_changed_model_reads_its_own_state(make_model: MakeModel, change: Change) -> None:
    """A state is written, the weights change, and the state brings back what the model computed."""
    model, inputs = make_model(), batch()
    with change(model):
        state = deepcopy(model.state_dict())
        before = model(**inputs).logits
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if QUANTIZERS not in name:
                    parameter.add_(0.1)
        assert not torch.equal(model(**inputs).logits, before)
        assert not any(model.load_state_dict(state))  # strict
        assert torch.equal(model(**inputs).logits, before)


def test_a_state_says_which_zeros_are_pruned(make_model: MakeModel) -> None:
    """Kept weights that are 0 or -0.0 stay kept in another pruner."""
    model, other = make_model(), make_model()
    weight = model.get_submodule(FIRST).weight
    with torch.no_grad():
        weight[:, :4] = torch.tensor([3.0, 2.0, 0.0, -0.0])
        weight[0, :4] = 0.0
    with sqat.Pruner(model, 10, recovery_fraction=0.5) as pruner, sqat.Pruner(other, 10, recovery_fraction=0.5) as copy:
        for _ in range(10):
            other.load_state_dict(model.state_dict())
            assert all(torch.equal(copy.masks.kept[name], mask) for name, mask in pruner.masks.kept.items())
            pruner.step()
        other.load_state_dict(model.state_dict())
    assert pruner.masks.kept[FIRST][0, :4].sum() == 2


def test_a_state_without_some_layers_is_read(make_model: MakeModel) -> None:
    """One shard of several: the layers that it does not hold stay as they are."""
    model = make_model()
    state = {f"{FIRST}.bias": torch.ones(model.config.hidden_size)}
    with masked(model):
        before = deepcopy(model.state_dict())
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != f"{FIRST}.bias")
    assert torch.equal(after[f"{FIRST}.bias"], state[f"{FIRST}.bias"])


def test_afterwards_the_state_dict_is_the_models_own(make_model: MakeModel) -> None:
    model = make_model()
    names, hooks = set(model.state_dict()), [len(module._state_dict_hooks) for module in model.modules()]
    with masked(model):
        pass
    assert set(model.state_dict()) == names
    assert [len(module._state_dict_hooks) for module in model.modules()] == hooks
