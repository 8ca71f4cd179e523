"""T16 and T17: int8 out of a quantized layer as well as in, and residual adds of two int8 tensors.

TensorRT picks a sparse int8 kernel only where a product's result, behind its bias, is int8 again
(NVIDIA Model-Optimizer, pull request 1664). Before an activation function that depends on fusion, so it is in doubt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.graph_view import (
    DEQUANTIZE,
    LAYOUT,
    LONGEST_PATH,
    PRODUCTS,
    QUANTIZE,
    SIZE_READERS,
    SUMS,
    GraphView,
    label,
    op_type,
)
from sqat.lint.weight import Weight

STAYS_FLOAT, IN_DOUBT = "its output stays float", "int8 only behind"
ACTIVATIONS = ("Gelu", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish",
               "Swish", "Mish", "Softplus", "Tanh", "Erf", "FastGelu", "QuickGelu", "BiasGelu")  # fmt: skip
BEFORE_ACTIVATION = "quantize what the activation reads too: calibrate with placement tensorrt-full"
ELEMENTWISE = (*SUMS, "Sub", "Mul", "Div", "Pow", "Neg", "Clip", "Cast", "Dropout")


@dataclass
class OutputTrace:
    """Where a product's output goes.

    Attributes:
        quantizers: the Qs behind its bias and changes of layout.
        others: what else reads it: a node and the tensor it reads; no node for an output of the graph.
        activation: the activation function behind which all of ``others`` meet a Q, empty if they do not.
    """

    quantizers: list[NodeProto] = field(default_factory=list)
    others: list[tuple[NodeProto | None, str]] = field(default_factory=list)
    activation: str = ""


def trace_output(view: GraphView, node: NodeProto) -> OutputTrace:
    """Follow a product's output forward."""
    trace = OutputTrace()
    pending = [(str(node.output[0]), False)]
    seen: set[str] = set()
    while pending and len(seen) < LONGEST_PATH:
        name, has_bias = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in view.outputs:
            trace.others.append((None, name))
        for reader in view.consumers.get(name, ()):
            if op_type(reader) == QUANTIZE and reader.input[0] == name:
                trace.quantizers.append(reader)
            elif op_type(reader) in LAYOUT and reader.input[0] == name:
                pending += [(output, has_bias) for output in reader.output]
            elif op_type(reader) in SUMS and not has_bias and adds_constant(view, reader, name):
                pending.append((reader.output[0], True))
            elif op_type(reader) not in SIZE_READERS:
                trace.others.append((reader, name))
    trace.activation = activation_before_quantizer(view, [name for _, name in trace.others])
    return trace


def adds_constant(view: GraphView, node: NodeProto, name: str) -> bool:
    """Whether all operands of a node but one are constants."""
    return all(entry == name or view.is_constant(entry) for entry in node.input if entry)


def activation_before_quantizer(view: GraphView, starts: list[str]) -> str:
    """The activation function through which all paths reach a Q, element by element; empty if one does not.

    GELU's error function and tanh form are followed through their sums and powers.
    """
    inside = set(starts)
    pending = list(inside)
    seen: list[NodeProto] = []
    while pending:
        if len(inside) > LONGEST_PATH:  # no activation function is that long
            return ""
        name = pending.pop()
        if name in view.outputs:
            return ""
        for reader in view.consumers.get(name, ()):
            if op_type(reader) in (QUANTIZE, *SIZE_READERS) or any(reader is node for node in seen):
                continue
            if reader.op_type not in (*ACTIVATIONS, *ELEMENTWISE, *LAYOUT):
                return ""
            seen.append(reader)
            new = [output for output in reader.output if output not in inside]
            inside.update(new)
            pending += new
    # A Mul with another product's result is a gate, part of the activation.
    gates = [node for node in seen if reads_from_outside(view, node, inside)]
    if any(node.op_type != "Mul" or not is_gate(view, node, inside) for node in gates):
        return ""
    names = [node.op_type for node in seen if node.op_type in ACTIVATIONS] + [node.op_type for node in gates]
    return names[0] if names and starts else ""


def reads_from_outside(view: GraphView, node: NodeProto, inside: set[str]) -> bool:
    """Whether a node also reads an activation from elsewhere."""
    data = node.input[:1] if op_type(node) in LAYOUT else node.input
    return any(name and name not in inside and not view.is_constant(name) for name in data)


def is_gate(view: GraphView, node: NodeProto, inside: set[str]) -> bool:
    """Whether what comes from elsewhere is another layer's result, element by element."""
    pending = [name for name in node.input if name not in inside and not view.is_constant(name)]
    for _ in range(LONGEST_PATH):
        source = view.producers.get(pending.pop()) if pending else None
        if source is None:
            return False
        if op_type(source) in PRODUCTS:
            return view.is_constant(source.input[1])
        if source.op_type in (*ACTIVATIONS, *ELEMENTWISE, *LAYOUT, QUANTIZE, DEQUANTIZE):
            pending += [name for name in source.input[:2] if name and not view.is_constant(name)][:1]
    return False


def check_int8_out(view: GraphView) -> Iterator[Problem]:
    """T16: a quantized layer's output reaches a Q on every path."""
    for weight in view.quantized_weights:
        trace = trace_output(view, weight.node)
        if trace.activation:
            text = f"{IN_DOUBT} {trace.activation}"
            yield Problem(label(weight.node), text, warning=True, advice=f"{BEFORE_ACTIVATION}, or leave it")
        elif trace.others:
            node = trace.others[0][0]
            where = f"goes to {node.op_type}" if node is not None else "is an output of the model"
            advice = BEFORE_ACTIVATION if node is not None and node.op_type in ACTIVATIONS else ""
            yield Problem(label(weight.node), f"{STAYS_FLOAT}: it {where}", advice=advice)
        elif not trace.quantizers:
            yield Problem(label(weight.node), f"{STAYS_FLOAT}: nothing reads it")


def check_one_output_scale(view: GraphView) -> Iterator[Problem]:
    """T16: layers that read one tensor (q, k and v) have one output scale, so that they can be merged."""
    groups: dict[str, list[tuple[Weight, float]]] = defaultdict(list)
    for weight in view.quantized_weights:
        quantizer = view.quantizer_before(weight.node.input[0])
        trace = trace_output(view, weight.node)
        scales = [scale for node in trace.quantizers if (scale := view.constant_value(node.input[1])) is not None]
        if quantizer is not None and scales and all(scale.size for scale in scales) and not trace.others:
            groups[quantizer.input[0]].append((weight, max(float(scale.max()) for scale in scales)))
    for group in groups.values():
        largest = max(own for _, own in group)
        for weight, own in group:
            if own != largest:
                text = f"output scale {own:.4g}, of those that read the same tensor {largest:.4g}"
                yield Problem(label(weight.node), text)


def check_residual_adds(view: GraphView) -> Iterator[Problem]:
    """T17: a residual Add takes both inputs from a DQ."""
    layers = {id(weight.node) for weight in view.quantized_weights}
    for node in view.nodes if layers else []:
        if op_type(node) != "Add" or any(view.is_constant(name) for name in node.input):
            continue
        if not any(comes_from_layer(view, name, layers) for name in node.input):
            continue
        is_residual = have_same_shape(*(view.shapes.get(name) for name in node.input))
        if is_residual is None:
            yield Problem(label(node), "shapes of its inputs are unknown, so it may be a residual Add", True)
        floats = [name for name in node.input if view.producer(view.layout_source(name), DEQUANTIZE) is None]
        if is_residual and floats:
            which = "both inputs are" if len(floats) == 2 else f"input {list(node.input).index(floats[0])} is"
            yield Problem(label(node), f"residual Add of which {which} float")


def comes_from_layer(view: GraphView, name: str, layers: set[int]) -> bool:
    """Whether a tensor is the result of one of the layers, behind bias, Q/DQ and changes of layout."""
    for _ in range(LONGEST_PATH):
        node = view.producer(name, *LAYOUT, QUANTIZE, DEQUANTIZE, *SUMS, *PRODUCTS)
        if node is None or id(node) in layers:
            return node is not None
        data = [entry for entry in node.input[:2] if not view.is_constant(entry)]
        if not data or (op_type(node) in SUMS and len(data) > 1) or op_type(node) in PRODUCTS:
            return False
        name = data[0]
    return False


def have_same_shape(first: tuple[int | str, ...] | None, second: tuple[int | str, ...] | None) -> bool | None:
    """Whether two tensors of rank 3 or more have one shape, as far as sizes are known; None for an unknown rank."""
    if first is None or second is None:
        return None
    pairs = list(zip(first, second, strict=False))
    differ = any(a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a and b)
    broadcast = any((a == 1) != (b == 1) for a, b in pairs)
    return len(first) == len(second) >= 3 and not broadcast and not differ
