"""Float graphs that are traced once for each architecture, and filled with the weights of each model of it.

A trace takes seconds, and its nodes do not depend on the weights. A rehearsal, which exports several branches of one
model, asks here. A real export traces its own model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from onnx import ModelProto
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from sqat.export.graph import export_float

Places = dict[int, tuple[str, bool]]  # number of an initializer -> the weight that it holds, and whether transposed
Traced = tuple[ModelProto, Places, str]  # the digest is of the parameters that the graph holds in other forms


@dataclass
class TracedGraphs:
    """Graphs without their weights, by architecture and inputs.

    Attributes:
        is_used: whether a model got the graph that another was traced for.
    """

    graphs: dict[tuple[str, ...], Traced | None] = field(default_factory=dict)
    is_used: bool = False

    def export(self, model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> ModelProto:
        """Return what `export_float` returns, but for the names and the order of equal weights."""
        kinds = [f"{name} {tensor.dtype} {tensor.shape[1:] if tensor.is_floating_point() else ''}"
                 for name, tensor in inputs.items()]  # fmt: skip
        buffers = hashlib.sha256(b"".join(content_of(buffer) for buffer in model.buffers())).hexdigest()
        key = (repr(model), str(model.config), buffers, output, *kinds)
        if key not in self.graphs:
            self.graphs[key] = trace_without_weights(model, inputs, output)
        traced = self.graphs[key]
        if traced is None or traced[2] != digest_without(model, traced[1]):
            return export_float(model, inputs, output)
        self.is_used = True
        return fill_weights(traced[0], traced[1], model)


def trace_without_weights(model: nn.Module, inputs: Mapping[str, Tensor], output: str) -> Traced | None:
    """Trace a copy with random weights, no two of them equal, and take these out of its graph.

    Returns:
        The graph, which initializer holds which weight, and a digest of the parameters without a gradient, which the
        copy keeps; None where the exporter computes with a weight.
    """
    stranger = copy.deepcopy(model).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for parameter in stranger.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    stranger(**inputs).logits.sum().backward()
    weights = {name: weight.detach() for name, weight in stranger.named_parameters() if weight.grad is not None}
    holders = {content_of(weight, is_transposed): (name, is_transposed)
               for name, weight in weights.items() for is_transposed in (True, False)}  # fmt: skip
    for name, own in model.named_parameters():
        if name not in weights:  # unused, or read without a gradient, such as tables of sines
            stranger.get_parameter(name).data = own.detach().clone()
    stranger.zero_grad()
    graph = export_float(stranger, inputs, output)
    places: Places = {}
    for number, tensor in enumerate(graph.graph.initializer):
        if place := holders.get(to_array(tensor).tobytes()):
            places[number] = place
    if {name for name, _ in places.values()} != set(weights):
        return None
    for number in places:
        graph.graph.initializer[number].ClearField("raw_data")
    return graph, places, digest_without(model, places)


def digest_without(model: nn.Module, places: Places) -> str:
    """Return a digest of the parameters that have no place."""
    placed = {name for name, _ in places.values()}
    others = (content_of(weight) for name, weight in model.named_parameters() if name not in placed)
    return hashlib.sha256(b"".join(others)).hexdigest()


def fill_weights(graph: ModelProto, places: Places, model: nn.Module) -> ModelProto:
    """Return the graph with the weights of a model."""
    filled, weights = copy.deepcopy(graph), dict(model.named_parameters())
    for number, (name, is_transposed) in places.items():
        filled.graph.initializer[number].raw_data = content_of(weights[name], is_transposed)
    return filled


def content_of(tensor: Tensor, is_transposed: bool = False) -> bytes:
    """Return the bytes of a tensor, rows and columns of a matrix exchanged if asked for."""
    content: bytes = (tensor.t() if is_transposed and tensor.dim() == 2 else tensor).detach().numpy().tobytes()
    return content
