"""What tells two models apart for the suite's store of traced graphs: everything that could change a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqat.export.graph import export_float
from tests import traces
from tests.traces import digest, traced

INPUTS = {"input_ids": torch.ones(2, 4, dtype=torch.long)}


class Tiny(nn.Module):
    """Two layers that may share their weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(10, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.load_state_dict(self.first.state_dict())
        if tied:
            self.second.weight = self.first.weight
        self.config = SimpleNamespace(width=8, name_or_path="a")

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.second(self.first(self.embed(input_ids))).sum(1))


def scaled(factor: float) -> Callable[..., Any]:
    return lambda module, args, y: SimpleNamespace(logits=y.logits * factor)


def hooked(factor: float) -> Tiny:
    model = Tiny()
    model.register_forward_hook(scaled(factor))
    return model


def weighted(change: float) -> Tiny:
    model = Tiny()
    with torch.no_grad():
        model.first.weight[0, 0] += change
    return model


def configured(**entries: Any) -> Tiny:
    model = Tiny()
    vars(model.config).update(entries)
    return model


def test_models_made_alike_are_alike() -> None:
    assert digest(Tiny()) == digest(Tiny()) == digest(configured(name_or_path="b"))
    assert digest(hooked(2.0)) == digest(hooked(2.0)), "hooks are numbered through the whole process"


def test_models_that_differ_in_anything_are_not() -> None:
    tied, double = Tiny(tied=True), Tiny().double()
    different = [Tiny(), tied, Tiny().eval(), double, hooked(2.0), hooked(3.0), weighted(1e-6), configured(width=9)]
    found = [digest(model) for model in different]
    assert None not in found
    assert len(set(found)) == len(found)
    assert digest((Tiny(), INPUTS)) != digest((Tiny(), {"input_ids": torch.ones(2, 5, dtype=torch.long)}))


def test_what_is_unknown_has_no_digest() -> None:
    assert digest(configured(generator=torch.Generator())) is None


def test_a_graph_is_traced_once_and_is_the_exporters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    def export(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        asked.append(model)
        return export_float(model, inputs)

    monkeypatch.setattr(traces, "FOLDER", [tmp_path])
    monkeypatch.setattr(traces, "export_float", export)
    models = [Tiny().eval(), Tiny().eval(), weighted(1.0).eval()]
    graphs = [traced(model, INPUTS) for model in models]
    assert asked == [models[0], models[2]]
    assert graphs[0] == graphs[1] == export_float(models[0], INPUTS)
    assert graphs[0] is not graphs[1]
    assert graphs[2] != graphs[0]
