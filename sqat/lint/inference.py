"""ONNX's own checks, and the types and shapes that its inference finds, on a copy without the large constants.

Why a copy: checker and inference write the model to bytes and read it again. That takes seconds and twice the
memory for a file of hundreds of megabytes, and is impossible over 2 GB; types and shapes of the weights are all they
need. Operators nobody knows are set aside, so that one of them does not hide what else is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

LARGE = 4096  # elements
STANDARD = ("", "ai.onnx")
ASIDE = "set.aside"
WIDTHS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2, TensorProto.INT8: 1}


def is_standard(node: NodeProto) -> bool:
    """Whether a node is of ONNX's own domain."""
    return node.domain in STANDARD


def opset_of(model: ModelProto) -> int:
    """Version of ONNX's own operators, 0 where the model does not say."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), 0)


def unknown_operators(model: ModelProto) -> list[NodeProto]:
    """Nodes whose operator ONNX does not define at the model's opset, and the model itself neither."""
    versions = {entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import}
    own = {(function.domain, function.name) for function in model.functions}

    def known(node: NodeProto) -> bool:
        version = versions.get(node.domain or "ai.onnx")
        if version is None:
            return False
        return (node.domain, node.op_type) in own or onnx.defs.has(
            node.op_type, version, "" if is_standard(node) else node.domain
        )

    return [node for node in model.graph.node if not known(node)]


def light_copy(model: ModelProto) -> ModelProto:
    """The model with large constants as inputs, and unknown operators in a domain that no check looks into."""
    graph = model.graph
    light = helper.make_model(helper.make_graph([], graph.name or "graph", [], []))
    light.ir_version = model.ir_version
    del light.opset_import[:]
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    aside = {id(node) for node in unknown_operators(model)}
    if aside:
        light.opset_import.append(helper.make_opsetid(ASIDE, 1))
    inputs = list(graph.input)
    named = {value.name for value in inputs}
    for node in graph.node:
        constant = large_constant(node)
        if constant is not None:
            inputs.append(value_of(constant, node.output[0]))
            continue
        light.graph.node.append(node)
        if id(node) in aside:
            light.graph.node[-1].domain = ASIDE
    for tensor in graph.initializer:
        if not is_large(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in named:
            inputs.append(value_of(tensor, tensor.name))
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
    """Whether a constant is a weight or a table, rather than something that shapes are computed from."""
    return bool(prod(tensor.dims) > LARGE)


def value_of(tensor: TensorProto, name: str) -> ValueInfoProto:
    """Type and shape of a constant."""
    return helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


@dataclass(frozen=True)
class Known:
    """Types and shapes of a graph's tensors.

    Attributes:
        shapes: by name; symbolic sizes as text, unknown ones as 0.
        types: element types of TensorProto by name.
    """

    shapes: dict[str, tuple[int | str, ...]]
    types: dict[str, int]


def infer(model: ModelProto) -> Known:
    """What the graph declares, and what inference adds; the declared alone where inference fails."""
    light = light_copy(model)
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        graph = light.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    known = Known({}, {tensor.name: int(tensor.data_type) for tensor in graph.initializer})
    known.shapes.update({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    for value in values:
        tensor_type = value.type.tensor_type
        if tensor_type.elem_type:
            known.types[value.name] = int(tensor_type.elem_type)
        if tensor_type.HasField("shape"):
            known.shapes[value.name] = tuple(size.dim_param or size.dim_value for size in tensor_type.shape.dim)
    return known


def structure_error(model: ModelProto) -> str:
    """What the ONNX checker has against the graph's build, one line; empty if nothing."""
    large = [tensor for tensor in model.graph.initializer if is_large(tensor)]
    try:
        onnx.checker.check_model(light_copy(model))
        for tensor in large:
            if not is_complete(tensor):
                onnx.checker.check_tensor(tensor)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return one_line(error)
    return ""


def is_complete(tensor: TensorProto) -> bool:
    """Whether a tensor holds as many bytes as its shape and type ask for, or keeps them elsewhere."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return True
    return tensor.data_type in WIDTHS and len(tensor.raw_data) == prod(tensor.dims) * WIDTHS[tensor.data_type]


def typing_error(model: ModelProto) -> str:
    """What strict type and shape inference has against the graph, one line; empty if nothing."""
    try:
        onnx.shape_inference.infer_shapes(light_copy(model), check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return one_line(error)
    return ""


def one_line(error: Exception) -> str:
    """A message without its line breaks."""
    return " ".join(str(error).split())
