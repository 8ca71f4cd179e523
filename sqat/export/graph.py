"""A float transformers encoder as an ONNX graph whose nodes say which module they came from.

What: `export_float` runs torch's exporter at opset 20 with symbolic batch and, for tokens, sequence and hands back a
graph in which every node is named ``/path/of/the/module/Op``, every weight of a linear ``module.weight``, and
nothing else of the exporter's metadata is left. The node name is the one carrier of the module name: the Q/DQ
writer, the checks and `sqat inspect` read it, and so do the messages of whatever runtime loads the file.

Why float first: tracing fake-quant ops fails under dynamic shapes, so Q/DQ pairs are inserted afterwards
(`sqat.export.qdq`). Why opset 20: ``Gelu`` stays one op, and ONNX Runtime refuses int8 at 21 with static
shapes. Left out: images of several sizes.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from onnx import GraphProto, ModelProto, NodeProto
from torch import Tensor, nn

from sqat.export.names import WEIGHTED, module_of, node_name

OPSET = 20
SCOPES = "pkg.torch.onnx.name_scopes"
ROOT = "model"


class Logits(nn.Module):
    """Positional tensors in, logits out: the shape of a forward that the exporter can name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, tensors, strict=True))).logits
        return logits


def export_float(model: nn.Module, inputs: Mapping[str, Tensor], output: str = "logits") -> ModelProto:
    """Export an encoder in float32, weights as they are.

    Args:
        model: transformers encoder, in eval mode, eager attention, no parametrizations; returns ``.logits``.
        inputs: an example batch by input name: integers [batch, sequence >= 2], or floats [batch, ...] (images), of
            which the batch alone varies; only names, types and widths matter.
        output: what the model's ``.logits`` is called in the graph.

    Returns:
        ModelProto of opset 20; inputs in the given order, one output [batch, ...]. It may hold more than
        2 GB: see `sqat.export.onnx_files`.

    Raises:
        ValueError: an input has another shape or the model is in training mode.
    """
    example = tuple(example_rows(name, tensor) for name, tensor in inputs.items())
    if model.training:
        raise ValueError("export needs a model in eval mode")
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes = tuple({0: batch} if tensor.is_floating_point() else {0: batch, 1: sequence} for tensor in example)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Logits(model, tuple(inputs)).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    assert program is not None
    exported: ModelProto = program.model_proto
    name_nodes_(exported.graph)
    name_initializers_(exported.graph)
    strip_metadata_(exported)
    return exported


def example_rows(name: str, tensor: Tensor) -> Tensor:
    """Two short rows of an input: a size of 1 would be taken for a constant by the exporter."""
    if tensor.is_floating_point():
        if tensor.dim() < 2 or not tensor.numel():
            raise ValueError(f"input {name} has shape {tuple(tensor.shape)}, needs [batch >= 1, ...]")
        return tensor[:1].repeat(2, *[1] * (tensor.dim() - 1))
    if tensor.dim() != 2 or tensor.shape[0] < 1 or tensor.shape[1] < 2:
        raise ValueError(f"input {name} has shape {tuple(tensor.shape)}, needs [batch >= 1, sequence >= 2]")
    return tensor[:1, :16].repeat(2, 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines; restored on leaving."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def name_nodes_(graph: GraphProto) -> None:
    """Name every node after the module that ran it and its operator, with a number where that repeats."""
    taken: dict[str, int] = {}
    for node in graph.node:
        name = node_name(scope_module(node), node.op_type)
        taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{taken[name]}" if taken[name] else name


def scope_module(node: NodeProto) -> str:
    """Module name in the exporter's metadata: the scope before the op's, without wrapper and call number."""
    scopes: list[str] = next(
        (ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == SCOPES), []
    )
    module = scopes[-2] if len(scopes) > 1 else ""
    return re.sub(r"@[0-9]+", "", module).removeprefix(f"{ROOT}.") if module.startswith(f"{ROOT}.") else ""


def name_initializers_(graph: GraphProto) -> None:
    """Name weights after their module (the exporter: ``val_87``); drop the wrapper's prefix elsewhere."""
    names = {tensor.name: tensor.name.removeprefix(f"{ROOT}.") for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in WEIGHTED and node.input[1] in names and module_of(node):
            names[node.input[1]] = f"{module_of(node)}.weight"
    taken: set[str] = set()
    for old, new in names.items():
        names[old] = old if new in taken else new
        taken.add(names[old])
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def strip_metadata_(model: ModelProto) -> None:
    """Drop stack traces, scopes and the rest of what the exporter notes about its own source code."""
    graph = model.graph
    for holder in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        del holder.metadata_props[:]
        holder.doc_string = ""
