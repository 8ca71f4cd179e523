"""B1, B14 and the rules without a number about operators: opset, operators, sizes of inputs, subgraphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.graph_editor import GraphEditor, remove_attribute_
from sqat.lint.graph_view import DEQUANTIZE, QUANTIZE, GraphView, int_attribute, label, op_type, subgraphs_of
from sqat.lint.weight import FLOATS
from sqat.onnx_files.checks import is_standard, unknown_operators

INTEGER_PREFIXES = ("QLinear", "MatMulInteger", "ConvInteger", "DynamicQuantize")
OPSETS, OLDER_OPSETS, READABLE_OPSETS = range(18, 21), range(13, 18), range(13, 26)
MICROSOFT, TENSORRT = "com.microsoft", "trt"


def check_opset(view: GraphView) -> Iterator[Problem]:
    """B1: opset 18 to 20; another one that rules can read."""
    if view.opset in READABLE_OPSETS and view.opset not in OPSETS:
        yield Problem("", f"opset {view.opset}, must be 18 to 20")


def check_older_opset(view: GraphView) -> Iterator[Problem]:
    """B1: opset 13 to 17, the last that TensorRT 8.6 reads; Gelu came with 20."""
    if view.opset in READABLE_OPSETS and view.opset not in OLDER_OPSETS:
        yield Problem("", f"opset {view.opset}, must be 13 to 17")


def check_readable_opset(view: GraphView) -> Iterator[Problem]:
    """B1: opset 13, the first with a scale per channel, to 25."""
    if view.opset not in READABLE_OPSETS:
        yield Problem("", f"opset {view.opset}, must be 18 to 20")


def check_operators(view: GraphView) -> Iterator[Problem]:
    """B1: Q/DQ around float operators, no integer operators."""
    for node in view.nodes:
        if is_integer_operator(node) or op_type(node) == "Attention":
            yield Problem(label(node), f"operator {node.op_type} instead of Q/DQ around a float one")


def is_integer_operator(node: NodeProto) -> bool:
    """Whether a node is one of ONNX's operators that multiply or quantize in integers themselves."""
    return op_type(node).startswith(INTEGER_PREFIXES)


def check_output_types(view: GraphView) -> Iterator[Problem]:
    """B1: no attribute output_dtype, which parsers of opset 20 do not know."""
    for node in view.nodes:
        if op_type(node) in (QUANTIZE, DEQUANTIZE) and any(entry.name == "output_dtype" for entry in node.attribute):
            yield Problem(label(node), "attribute output_dtype")


def drop_output_types_(editor: GraphEditor) -> None:
    """Drop an output_dtype that repeats the type of a Q's zero-point or of a DQ's scale (B1)."""
    for node in editor.view.nodes:
        if op_type(node) not in (QUANTIZE, DEQUANTIZE):
            continue
        is_quantizer, has_zero_point = op_type(node) == QUANTIZE, len(node.input) > 2
        dtype = int_attribute(node, "output_dtype", 0)
        source = node.input[2 if is_quantizer and has_zero_point else 1]
        if dtype and dtype == editor.view.types.get(source) and (has_zero_point or not is_quantizer):
            remove_attribute_(node, "output_dtype")
            editor.record("B1", label(node), "dropped output_dtype, which repeats the type of the inputs")


def check_symbolic_sizes(view: GraphView) -> Iterator[Problem]:
    """B14: batch and sequence are symbolic in every input; of images and features the batch."""
    for value in view.model.graph.input:
        tensor_type = value.type.tensor_type
        if value.name in view.constants or not tensor_type.HasField("shape"):
            continue
        sizes = tensor_type.shape.dim
        is_sequence = len(sizes) == 3 or (len(sizes) == 2 and tensor_type.elem_type not in FLOATS)
        free = sizes[: 2 if is_sequence else 1] if len(sizes) > 1 else []
        if any(size.HasField("dim_value") for size in free):
            shape = tuple(size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in sizes)
            yield Problem(value.name, f"fixed input shape {shape}")


def check_float_file(view: GraphView) -> Iterator[Problem]:
    """No Q/DQ in a float file; the DQ of a stored table is none."""
    for node in view.nodes:
        is_table = op_type(node) == DEQUANTIZE and reads_embedding_table(view, node)
        if (op_type(node) in (QUANTIZE, DEQUANTIZE) and not is_table) or is_integer_operator(node):
            yield Problem(label(node), f"{node.op_type} in a float file")


def reads_embedding_table(view: GraphView, node: NodeProto) -> bool:
    """Whether a DQ dequantizes an embedding table, before its Gather or behind it."""
    if view.is_constant(node.input[0]):
        return all(op_type(reader) == "Gather" for reader in view.consumers_of(node))
    gather = view.producer(node.input[0], "Gather")
    return gather is not None and view.is_constant(gather.input[0])


def check_microsoft_operators(view: GraphView) -> Iterator[Problem]:
    """No operators of ONNX Runtime's own domain."""
    return unknown_problems(view, lambda domain: domain.startswith(MICROSOFT))


def check_tensorrt_operators(view: GraphView) -> Iterator[Problem]:
    """No operators of TensorRT's own domain, which are plugins."""
    return unknown_problems(view, lambda domain: domain.startswith(TENSORRT))


def check_other_operators(view: GraphView) -> Iterator[Problem]:
    """No operators of any other domain, nor any that ONNX does not define at this opset."""
    return unknown_problems(view, lambda domain: not domain.startswith((MICROSOFT, TENSORRT)))


def unknown_problems(view: GraphView, is_meant: Callable[[str], bool]) -> Iterator[Problem]:
    """Problems with unknown operators of some domains."""
    for node in unknown_operators(view.model):
        if is_meant(node.domain):
            place = f"of domain {node.domain}" if not is_standard(node) else f"at opset {view.opset}"
            yield Problem(label(node), f"operator {node.op_type} {place} is not known to ONNX")


def check_subgraphs(view: GraphView) -> Iterator[Problem]:
    """No If, Loop, Scan or function: rules do not read inside them."""
    functions = {(function.domain, function.name) for function in view.model.functions}
    for node in view.nodes:
        if subgraphs_of(node):
            yield Problem(label(node), f"rules do not read the subgraph of {node.op_type}", warning=True)
    for node in view.nodes:
        if (node.domain, node.op_type) in functions:
            yield Problem(label(node), f"rules do not read the function {node.op_type}", warning=True)
