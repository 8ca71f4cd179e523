"""A graph traced once, filled with a model's weights, computes what that model's own graph computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from sqat.export import traced_graphs
from sqat.export.graph import export_float
from sqat.export.traced_graphs import TracedGraphs
from sqat.models.attention import use_eager
from sqat.runtime.sessions import run_batches, session
from tests.tiny import MakeModel, random_batch


def logits(graph: ModelProto) -> NDArray[np.float32]:
    arrays = {name: tensor.numpy() for name, tensor in random_batch().items()}
    return run_batches(session(graph.SerializeToString()), [arrays])


def shifted(model: nn.Module) -> nn.Module:
    """The same architecture with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are traced."""
    found: list[nn.Module] = []

    def traced(model: nn.Module, inputs: Mapping[str, Tensor], *names: str) -> Any:
        found.append(model)
        return export_float(model, inputs, *names)

    monkeypatch.setattr(traced_graphs, "export_float", traced)
    return found


def test_models_of_one_architecture_share_a_trace(make_model: MakeModel, traces: list[nn.Module]) -> None:
    plain, graphs = make_model("bert", num_hidden_layers=1), TracedGraphs()
    other = shifted(make_model("bert", num_hidden_layers=1))
    for model in (plain, other):
        use_eager(model)
        graph = graphs.export(model, random_batch(), "logits")
        assert np.array_equal(logits(graph), logits(export_float(model, random_batch())))
    assert len(traces) == 1
    assert graphs.is_used
    (traced,) = graphs.graphs.values()
    assert traced is not None
    assert traced[0].ByteSize() < 100_000, "it holds no weight"


def test_a_weight_that_the_exporter_computes_with_is_traced_for_itself(
    make_model: MakeModel, traces: list[nn.Module]
) -> None:
    model, graphs = make_model("deberta-v2", num_hidden_layers=1), TracedGraphs()
    use_eager(model)
    graph = graphs.export(model, random_batch(), "logits")
    assert traces[-1] is model
    assert not graphs.is_used
    assert np.array_equal(logits(graph), logits(export_float(model, random_batch())))


class Sines(nn.Module):
    """A model that reads a table without a gradient, as RoFormer reads its sines."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.config = "sines"
        self.words, self.head = nn.Embedding(70, 8), nn.Linear(8, 2)
        self.table = nn.Parameter(torch.full((40, 8), fill), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        with torch.no_grad():
            table = self.table[: input_ids.shape[1]].sin()
        read = (self.words(input_ids) + table) * attention_mask[:, :, None]
        return SequenceClassifierOutput(logits=self.head(read.sum(1)))


def test_a_table_that_is_read_without_a_gradient_is_the_models_own() -> None:
    graphs = TracedGraphs()
    for fill in (0.5, 0.5, 1.5):
        model = Sines(fill).eval()
        with torch.no_grad():
            expected = model(**random_batch()).logits.numpy()
        np.testing.assert_allclose(logits(graphs.export(model, random_batch(), "logits")), expected, atol=1e-5)
