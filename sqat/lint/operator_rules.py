"""Rules about a file as a whole: its opset and operators (B1), its inputs (B14), its initializers (B15).

Beyond the numbered rules: operators that ONNX does not know, subgraphs, and Q/DQ in a file that should be float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.inference import is_standard, unknown_operators
from sqat.lint.weights import FLOATS
from sqat.lint.wiring import DEQUANTIZE, QUANTIZE, Wiring, label, operator, subgraphs_of

FORBIDDEN = ("QLinear", "MatMulInteger", "ConvInteger", "DynamicQuantize")
OPSETS, OLDER_OPSETS, POSSIBLE_OPSETS = range(18, 21), range(13, 18), range(13, 26)
MICROSOFT, TENSORRT = "com.microsoft", "trt"


def opset(wiring: Wiring) -> Iterator[Problem]:
    """Opset 18 to 20, where another can still be read."""
    if wiring.opset in POSSIBLE_OPSETS and wiring.opset not in OPSETS:
        yield Problem("", f"opset {wiring.opset}, must be 18 to 20")


def older_opset(wiring: Wiring) -> Iterator[Problem]:
    """Opset 13 to 17, the last that TensorRT 8.6 reads; Gelu came with 20."""
    if wiring.opset in POSSIBLE_OPSETS and wiring.opset not in OLDER_OPSETS:
        yield Problem("", f"opset {wiring.opset}, must be 13 to 17")


def readable_opset(wiring: Wiring) -> Iterator[Problem]:
    """Opset 13 (the first with a scale per channel) to 25."""
    if wiring.opset not in POSSIBLE_OPSETS:
        yield Problem("", f"opset {wiring.opset}, must be 18 to 20")


def operators(wiring: Wiring) -> Iterator[Problem]:
    """Explicit Q/DQ around float operators, nothing quantized inside."""
    for node in wiring.nodes:
        if is_integer(node) or operator(node) == "Attention":
            yield Problem(label(node), f"operator {node.op_type} instead of Q/DQ around a float one")


def is_integer(node: NodeProto) -> bool:
    """Whether a node is one of ONNX's operators that multiply or quantize in integers themselves."""
    return operator(node).startswith(FORBIDDEN)


def output_types(wiring: Wiring) -> Iterator[Problem]:
    """No attribute output_dtype, which parsers of opset 20 do not know."""
    for node in wiring.nodes:
        if operator(node) in (QUANTIZE, DEQUANTIZE) and any(entry.name == "output_dtype" for entry in node.attribute):
            yield Problem(label(node), "attribute output_dtype")


def float_only(wiring: Wiring) -> Iterator[Problem]:
    """No Q/DQ in a float file; the DequantizeLinear of a stored table is none."""
    for node in wiring.nodes:
        table = operator(node) == DEQUANTIZE and feeds_gather(wiring, node)
        if (operator(node) in (QUANTIZE, DEQUANTIZE) and not table) or is_integer(node):
            yield Problem(label(node), f"{node.op_type} in a float file")


def feeds_gather(wiring: Wiring, node: NodeProto) -> bool:
    """Whether a DQ unpacks an embedding table: before its Gather, or behind it."""
    if wiring.is_constant(node.input[0]):
        return all(operator(reader) == "Gather" for reader in wiring.following(node))
    gather = wiring.producer(node.input[0], "Gather")
    return gather is not None and wiring.is_constant(gather.input[0])


def microsoft_operators(wiring: Wiring) -> Iterator[Problem]:
    """Operators of ONNX Runtime's own domain."""
    yield from foreign(wiring, lambda domain: domain.startswith(MICROSOFT))


def tensorrt_operators(wiring: Wiring) -> Iterator[Problem]:
    """Operators of TensorRT's own domain: plugins."""
    yield from foreign(wiring, lambda domain: domain.startswith(TENSORRT))


def other_operators(wiring: Wiring) -> Iterator[Problem]:
    """Operators of any other domain, or that ONNX does not define at this opset."""
    yield from foreign(wiring, lambda domain: not domain.startswith((MICROSOFT, TENSORRT)))


def foreign(wiring: Wiring, meant: Callable[[str], bool]) -> Iterator[Problem]:
    """Unknown operators of the domains meant."""
    for node in unknown_operators(wiring.model):
        if meant(node.domain):
            home = f"of domain {node.domain}" if not is_standard(node) else f"at opset {wiring.opset}"
            yield Problem(label(node), f"operator {node.op_type} {home} is not known to ONNX")


def subgraphs(wiring: Wiring) -> Iterator[Problem]:
    """If, Loop, Scan and functions, whose insides no rule sees."""
    for node in wiring.nodes:
        if subgraphs_of(node):
            yield Problem(label(node), f"the subgraph of {node.op_type} is not looked into", warning=True)
    own = {(function.domain, function.name) for function in wiring.model.functions}
    for node in wiring.nodes:
        if (node.domain, node.op_type) in own:
            yield Problem(label(node), f"the function {node.op_type} is not looked into", warning=True)


def symbolic_sizes(wiring: Wiring) -> Iterator[Problem]:
    """Batch and sequence are symbolic in every input; of images and of features the batch."""
    for value in wiring.model.graph.input:
        tensor_type = value.type.tensor_type
        if value.name in wiring.tensors or not tensor_type.HasField("shape"):
            continue
        sizes = tensor_type.shape.dim
        is_sequence = len(sizes) == 3 or (len(sizes) == 2 and tensor_type.elem_type not in FLOATS)
        free = sizes[: 2 if is_sequence else 1] if len(sizes) > 1 else []
        if any(size.HasField("dim_value") for size in free):
            shape = tuple(size.dim_param or (size.dim_value if size.HasField("dim_value") else "?") for size in sizes)
            yield Problem(value.name, f"fixed input shape {shape}")


def own_initializers(wiring: Wiring) -> Iterator[Problem]:
    """A quantized weight has one reader; no initializer is left over."""
    for tensor in wiring.model.graph.initializer:
        if tensor.name not in wiring.readers and tensor.name not in wiring.outputs:
            yield Problem(tensor.name, "initializer that nothing reads")
    for weight in wiring.weights:
        readers = wiring.readers[weight.name]
        if weight.dequantizer is None:
            continue
        if len(readers) != 1:
            yield Problem(label(weight.node), f"quantized weight {weight.name} has {len(readers)} readers")
        shared = next((step for step in weight.steps if len(wiring.following(step)) > 1), None)
        if shared is not None:
            yield Problem(label(weight.node), f"quantized weight {weight.name} is shared behind {label(shared)}")
