"""Export a float transformers model as an ONNX graph whose node names say their module.

Nodes are named ``/path/of/the/module/Op`` and weights ``module.weight``; the exporter's metadata is dropped. Q/DQ pairs
are inserted afterwards (`sqat.export.qdq`): tracing fake quantization fails under dynamic shapes. Opset 20 keeps
``Gelu`` one operator.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper
from torch import Tensor, nn

from sqat.errors import SqatError, first_line
from sqat.export.names import WEIGHTED, module_of, node_name
from sqat.modules.outputs import tensor_outputs

OPSET = 20
LONGEST_REASON = 200  # characters
SCOPES = "pkg.torch.onnx.name_scopes"
ROOT = "model"
INSTEAD = "export torch-semi-structured or compressed-tensors, which need no ONNX graph"


class PositionalModel(nn.Module):
    """A model with positional inputs and outputs, whose names the exporter takes."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = tensor_outputs(self.model(**dict(zip(self.inputs, tensors, strict=True))))
        return tuple(named[name] for name in self.outputs)


def export_float(model: nn.Module, inputs: Mapping[str, Tensor], output: str | None = "logits") -> ModelProto:
    """Export an encoder in float32, weights as they are.

    Args:
        model: in eval mode, with eager attention and no parametrizations.
        inputs: an example batch by input name: integers [batch, sequence >= 2], or floats [batch, ...] (images), of
            which only the batch varies; only names, types and widths matter.
        output: name of the model's ``.logits`` in the graph, its only output; None: every tensor that the model
            returns, under its own name.

    Returns:
        ModelProto of opset 20 with inputs in the given order and outputs [batch, ...]; it may exceed 2 GB.

    Raises:
        ValueError: an input has another shape, or the model is in training mode.
        SqatError: torch cannot trace the model, or only for inputs of the example's size.
    """
    example = tuple(example_rows(name, tensor) for name, tensor in inputs.items())
    if model.training:
        raise ValueError("export needs a model in eval mode")
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes = tuple({0: batch} if tensor.is_floating_point() else {0: batch, 1: sequence} for tensor in example)
    with quiet(), torch.no_grad():
        returned = ["logits"] if output else list(tensor_outputs(model(**dict(zip(inputs, example, strict=True)))))
        wrapper = PositionalModel(model, list(inputs), returned).eval()
        program = trace(wrapper, example, [output] if output else returned, axes)
    exported: ModelProto = program.model_proto
    check_axes(exported.graph, axes, type(model).__name__)
    fold_transposes_(exported.graph)
    paths = first_paths(model)
    name_nodes_(exported.graph, paths)
    name_initializers_(exported.graph, paths)
    strip_metadata_(exported)
    return exported


def check_axes(graph: GraphProto, axes: Sequence[dict[int, Any]], model: str) -> None:
    """Refuse a graph whose inputs have one size where they may vary.

    Raises:
        SqatError: such a graph reads no other texts.
    """
    for value, varying in zip(graph.input, axes, strict=True):
        sizes = [dim.dim_value or "any" for dim in value.type.tensor_type.shape.dim]
        if any(sizes[axis] != "any" for axis in varying):
            raise SqatError(f"torch exports {model} only with {value.name} of size {' x '.join(map(str, sizes))}",
                            INSTEAD, code="unsupported-model")  # fmt: skip


def trace(
    model: PositionalModel, example: tuple[Tensor, ...], outputs: list[str], axes: Sequence[dict[int, Any]]
) -> torch.onnx.ONNXProgram:
    """Run torch's exporter; whatever it raises becomes one line.

    Raises:
        SqatError: torch cannot trace the model, or ONNX has no operator for a part of it.
    """
    try:
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(model.inputs),
            output_names=outputs,
            dynamic_shapes=(axes,),
            verbose=False,
        )
    except (SqatError, MemoryError):
        raise
    except Exception as error:
        name, reason = type(model.model).__name__, first_line(root_cause(error))
        raise SqatError(f"torch cannot export {name} as ONNX: {shorten(reason, LONGEST_REASON)}",
                        INSTEAD,
                        code="unsupported-model") from error  # fmt: skip
    assert program is not None
    return program


def root_cause(error: BaseException) -> BaseException:
    """Return the error that all others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def example_rows(name: str, tensor: Tensor) -> Tensor:
    """Make two short rows of an input: the exporter takes a size of 1 for a constant."""
    if tensor.is_floating_point():
        if tensor.dim() < 2 or not tensor.numel():
            raise ValueError(f"input {name} has shape {tuple(tensor.shape)}, needs [batch >= 1, ...]")
        return tensor[:1].repeat(2, *[1] * (tensor.dim() - 1))
    if tensor.dim() != 2 or tensor.shape[0] < 1 or tensor.shape[1] < 2:
        raise ValueError(f"input {name} has shape {tuple(tensor.shape)}, needs [batch >= 1, sequence >= 2]")
    return tensor[:1, :16].repeat(2, 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter warns, logs and prints for as long as the block runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_paths(model: nn.Module) -> dict[str, str]:
    """Return for each path to a module the one that `named_modules` gives; a module may have several."""
    first = {module: path for path, module in model.named_modules()}
    return {path: first[module] for path, module in model.named_modules(remove_duplicate=False)}


def fold_transposes_(graph: GraphProto) -> None:
    """Store the weight of a module that runs several times as its products read it; the exporter does so for one."""
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    readers: dict[str, list[NodeProto]] = {name: [] for name in weights}
    for node in graph.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node)
    folded: dict[str, str] = {}
    for name, nodes in readers.items():
        if nodes and all(node.op_type == "Transpose" for node in nodes):
            transposed = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
            weights[name].CopyFrom(numpy_helper.from_array(transposed, name))
            folded |= {node.output[0]: name for node in nodes}
    kept = [node for node in graph.node if node.output[0] not in folded]
    del graph.node[:]
    graph.node.extend(kept)
    for node in graph.node:
        node.input[:] = [folded.get(name, name) for name in node.input]


def name_nodes_(graph: GraphProto, paths: Mapping[str, str]) -> None:
    """Name every node after its module and operator, with a number where that repeats.

    Args:
        paths: from `first_paths`.
    """
    counts: dict[str, int] = {}
    for node in graph.node:
        module = scope_module(node)
        name = node_name(paths.get(module, module), node.op_type)
        counts[name] = counts.get(name, -1) + 1
        node.name = f"{name}_{counts[name]}" if counts[name] else name


def scope_module(node: NodeProto) -> str:
    """Get the module name from the exporter's metadata, without wrapper and call number."""
    scopes: list[str] = next(
        (ast.literal_eval(entry.value) for entry in node.metadata_props if entry.key == SCOPES), []
    )
    module = scopes[-2] if len(scopes) > 1 else ""
    return re.sub(r"@[0-9]+", "", module).removeprefix(f"{ROOT}.") if module.startswith(f"{ROOT}.") else ""


def name_initializers_(graph: GraphProto, paths: Mapping[str, str]) -> None:
    """Name weights after their module (the exporter says ``val_87``); drop the wrapper's prefix elsewhere.

    Args:
        paths: from `first_paths`.
    """
    names = {tensor.name: first_name(tensor.name.removeprefix(f"{ROOT}."), paths) for tensor in graph.initializer}
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


def first_name(tensor: str, paths: Mapping[str, str]) -> str:
    """Return the name of a parameter by the first path to its module."""
    module, dot, own = tensor.rpartition(".")
    return f"{paths.get(module, module)}{dot}{own}"


def strip_metadata_(model: ModelProto) -> None:
    """Drop the exporter's stack traces, scopes and other notes."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for holder in (model, graph, *graph.node, *values):
        del holder.metadata_props[:]
        holder.doc_string = ""
