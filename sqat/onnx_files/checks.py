"""ONNX's own checker and inference, on a copy of a model without its large constants.

Both write the model to bytes and read it again, which is slow for large files and impossible over 2 GB. Types and
shapes of the weights are all that they need.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from sqat.onnx_files.values import value_fault

LARGE = 4096  # elements
STANDARD = ("", "ai.onnx")
VERSIONS = range(1, 1 << 31)  # what ONNX's own functions take
UNCHECKED = "unchecked"  # the domain of unknown operators in a light copy, so that one does not hide other faults
FAULTS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError)


def is_standard(node: NodeProto) -> bool:
    """Whether a node is of ONNX's own domain."""
    return node.domain in STANDARD


def opset_of(model: ModelProto) -> int:
    """Version of ONNX's own operators, 0 where the model does not say."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), 0)


def unknown_operators(model: ModelProto) -> list[NodeProto]:
    """Nodes whose operator neither ONNX at the model's opset nor the model itself defines."""
    is_defined = make_definition_test(model)
    return [node for node in model.graph.node if not is_defined(node)]


def make_definition_test(model: ModelProto) -> Callable[[NodeProto], bool]:
    """A function that says whether ONNX at the model's opset, or the model itself, defines a node's operator."""
    versions = {entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import}
    functions = {(function.domain, function.name) for function in model.functions}

    def is_defined(node: NodeProto) -> bool:
        version = versions.get(node.domain or "ai.onnx")
        if version is None or version not in VERSIONS:
            return False
        domain = "" if is_standard(node) else node.domain
        return (node.domain, node.op_type) in functions or onnx.defs.has(node.op_type, version, domain)

    return is_defined


def light_copy(model: ModelProto) -> ModelProto:
    """Copy a model with large constants as inputs, and unknown operators in a domain that no check reads."""
    graph = model.graph
    light = helper.make_model(helper.make_graph([], graph.name or "graph", [], []))
    light.ir_version = model.ir_version
    del light.opset_import[:]
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    is_defined, has_unknown = make_definition_test(model), False
    inputs = list(graph.input)
    input_names = {value.name for value in inputs}
    for node in graph.node:
        constant = large_constant(node)
        if constant is not None:
            inputs.append(describe(constant, node.output[0]))
            continue
        light.graph.node.append(node)
        if not is_defined(node):
            light.graph.node[-1].domain, has_unknown = UNCHECKED, True
    if has_unknown:
        light.opset_import.append(helper.make_opsetid(UNCHECKED, 1))
    for tensor in graph.initializer:
        if not is_large(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in input_names:
            inputs.append(describe(tensor, tensor.name))
    light.graph.sparse_initializer.extend(graph.sparse_initializer)
    light.graph.input.extend(inputs)
    light.graph.output.extend(graph.output)
    light.graph.value_info.extend(graph.value_info)
    return light


def large_constant(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node, if it is a large one."""
    for attribute in node.attribute if node.op_type == "Constant" else ():
        if attribute.type == AttributeProto.TENSOR and is_large(attribute.t):
            tensor: TensorProto = attribute.t
            return tensor
    return None


def is_large(tensor: TensorProto) -> bool:
    """Whether a constant is a weight or a table, and no shape is computed from it."""
    return bool(prod(tensor.dims) > LARGE)


def describe(tensor: TensorProto, name: str) -> ValueInfoProto:
    """Type and shape of a constant."""
    return helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


@dataclass(frozen=True)
class TensorInfo:
    """Types and shapes of a graph's tensors, by name.

    Attributes:
        shapes: symbolic sizes as text, unknown ones as 0.
        types: element types of TensorProto.
    """

    shapes: dict[str, tuple[int | str, ...]]
    types: dict[str, int]


def infer(model: ModelProto) -> TensorInfo:
    """Collect what the graph declares and what inference adds; only the former where inference fails."""
    light = light_copy(model)
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except FAULTS:
        graph = light.graph
    shapes: dict[str, tuple[int | str, ...]] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    types = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor_type = value.type.tensor_type
        if tensor_type.elem_type:
            types[value.name] = int(tensor_type.elem_type)
        if tensor_type.HasField("shape"):
            shapes[value.name] = tuple(size.dim_param or size.dim_value for size in tensor_type.shape.dim)
    return TensorInfo(shapes, types)


def structure_error(model: ModelProto) -> str:
    """The first fault that the ONNX checker finds, one line; empty if there is none."""
    if fault := structure_fault(light_copy(model)):
        return fault
    return next((fault for tensor in model.graph.initializer if (fault := value_fault(tensor))), "")


def typing_error(model: ModelProto) -> str:
    """The first fault that strict type and shape inference finds, one line; empty if there is none."""
    return typing_fault(light_copy(model))


def structure_fault(light: ModelProto) -> str:
    """What the ONNX checker refuses in a light copy."""
    try:
        onnx.checker.check_model(light)
    except FAULTS as error:
        return one_line(error)
    return ""


def typing_fault(light: ModelProto) -> str:
    """What strict type and shape inference refuses in a light copy."""
    try:
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except FAULTS as error:
        return one_line(error)
    return ""


def check_file(path: Path) -> Iterator[str]:
    """Yield what the ONNX checker and strict shape inference find wrong in a file of any size."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        with tempfile.TemporaryDirectory() as folder:
            inferred = str(Path(folder) / "inferred.onnx")
            onnx.shape_inference.infer_shapes_path(
                str(path), inferred, check_type=True, strict_mode=True, data_prop=True
            )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        yield one_line(error)


def one_line(error: Exception) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
