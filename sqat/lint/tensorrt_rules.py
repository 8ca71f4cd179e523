"""Rules of TensorRT: int8 out as well as in (T16), residual adds (T17), convolutions for version 8 (T20).

T16 decides whether a sparse kernel is picked: NVIDIA's own example saw TensorRT choose sparse int8 kernels only where
a product's result, after its bias, is int8 again. A product before an activation function is in doubt: int8 there
depends on the activation being fused into it. Left out: which kernel the engine's timer finds faster, which a graph
does not tell (small layers often stay dense); `sqat engine` reads that from the build log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import NodeProto

from sqat.lint.findings import Problem
from sqat.lint.layer_rules import is_sparse, quantized
from sqat.lint.weights import Weight
from sqat.lint.wiring import DEQUANTIZE, LAYOUT, PRODUCTS, QUANTIZE, SIZE_READERS, Wiring, label, operator

FLOATING, IN_DOUBT = "its output stays float", "int8 only behind"


@dataclass
class Fate:
    """What becomes of a product's output.

    Attributes:
        quantizers: the Qs it meets behind its bias and changes of layout.
        others: what else it meets first: a node and the tensor it reads; no node for an output of the graph.
        activation: the activation function behind which all those meet a Q, empty if they do not.
    """

    quantizers: list[NodeProto] = field(default_factory=list)
    others: list[tuple[NodeProto | None, str]] = field(default_factory=list)
    activation: str = ""


def fate_of(wiring: Wiring, node: NodeProto) -> Fate:
    """Follow a product's output forward."""
    fate = Fate()
    waiting = [(str(node.output[0]), False)]
    while waiting:
        name, biased = waiting.pop()
        if name in wiring.outputs:
            fate.others.append((None, name))
        for reader in wiring.readers.get(name, ()):
            if operator(reader) == QUANTIZE and reader.input[0] == name:
                fate.quantizers.append(reader)
            elif operator(reader) in LAYOUT and reader.input[0] == name:
                waiting += [(output, biased) for output in reader.output]
            elif operator(reader) == "Add" and not biased and other_is_constant(wiring, reader, name):
                waiting.append((reader.output[0], True))
            elif operator(reader) not in SIZE_READERS:
                fate.others.append((reader, name))
    fate.activation = activation_before_quantizer(wiring, fate.others)
    return fate


def other_is_constant(wiring: Wiring, node: NodeProto, name: str) -> bool:
    """Whether all operands of a node but one are constants."""
    return all(entry == name or wiring.is_constant(entry) for entry in node.input if entry)


def activation_before_quantizer(wiring: Wiring, starts: list[tuple[NodeProto | None, str]]) -> str:
    """The activation function through which all paths reach a Q, element by element; empty if one does not.

    A Mul with another product's result is a gate, part of the activation. The error function's and the tanh form of
    GELU are followed through their sums and powers.
    """
    inside = {name for _, name in starts}
    waiting = list(inside)
    seen: list[NodeProto] = []
    while waiting:
        name = waiting.pop()
        if name in wiring.outputs:
            return ""
        for reader in wiring.readers.get(name, ()):
            if operator(reader) in (QUANTIZE, *SIZE_READERS) or any(reader is node for node in seen):
                continue
            if reader.op_type not in (*ACTIVATIONS, *ELEMENTWISE, *LAYOUT):
                return ""
            seen.append(reader)
            new = [output for output in reader.output if output not in inside]
            inside.update(new)
            waiting += new
    gates = [node for node in seen if mixes(wiring, node, inside)]
    if any(node.op_type != "Mul" or not is_gate(wiring, node, inside) for node in gates):
        return ""
    names = [node.op_type for node in seen if node.op_type in ACTIVATIONS] + [node.op_type for node in gates]
    return names[0] if names and starts else ""


def mixes(wiring: Wiring, node: NodeProto, inside: set[str]) -> bool:
    """Whether a node also reads an activation from elsewhere."""
    data = node.input[:1] if operator(node) in LAYOUT else node.input
    return any(name and name not in inside and not wiring.is_constant(name) for name in data)


def is_gate(wiring: Wiring, node: NodeProto, inside: set[str]) -> bool:
    """Whether what comes from elsewhere is made from another layer's result, element by element."""
    waiting = [name for name in node.input if name not in inside and not wiring.is_constant(name)]
    while waiting:
        maker = wiring.producers.get(waiting.pop())
        if maker is None:
            return False
        if operator(maker) in PRODUCTS:
            return wiring.is_constant(maker.input[1])
        if maker.op_type in (*ACTIVATIONS, *ELEMENTWISE, *LAYOUT, QUANTIZE, DEQUANTIZE):
            waiting += [name for name in maker.input[:2] if name and not wiring.is_constant(name)][:1]
    return False


def int8_out(wiring: Wiring) -> Iterator[Problem]:
    """A quantized layer's output reaches a QuantizeLinear on every path."""
    for weight in quantized(wiring):
        fate = fate_of(wiring, weight.node)
        if fate.activation:
            fix = "quantize what the activation reads too (calibrate with placement tensorrt-full), or leave it"
            yield Problem(label(weight.node), f"{IN_DOUBT} {fate.activation}", warning=True, fix=fix)
        elif fate.others:
            node = fate.others[0][0]
            where = f"goes to {node.op_type}" if node is not None else "is an output of the model"
            yield Problem(label(weight.node), f"{FLOATING}: it {where}")
        elif not fate.quantizers:
            yield Problem(label(weight.node), f"{FLOATING}: nothing reads it")


def one_output_scale(wiring: Wiring) -> Iterator[Problem]:
    """Layers that read one tensor (q, k and v) have one output scale, so that they can be merged."""
    groups: dict[str, list[tuple[Weight, float]]] = defaultdict(list)
    for weight in quantized(wiring):
        pair = wiring.pair_before(weight.node.input[0])
        fate = fate_of(wiring, weight.node)
        found = [scale for node in fate.quantizers if (scale := wiring.constant(node.input[1])) is not None]
        if pair is not None and found and not fate.others:
            groups[pair.input[0]].append((weight, max(float(scale.max()) for scale in found)))
    for group in groups.values():
        largest = max(own for _, own in group)
        for weight, own in group:
            if own != largest:
                text = f"output scale {own:.4g}, of those that read the same tensor {largest:.4g}"
                yield Problem(label(weight.node), text)


def residual_adds(wiring: Wiring) -> Iterator[Problem]:
    """A residual Add takes both inputs from a DQ."""
    layers = {id(weight.node) for weight in quantized(wiring)}
    for node in wiring.nodes if layers else []:
        if operator(node) != "Add" or any(wiring.is_constant(name) for name in node.input):
            continue
        if not any(comes_from(wiring, name, layers) for name in node.input):
            continue
        alike = same_shape(*(wiring.shapes.get(name) for name in node.input))
        if alike is None:
            yield Problem(label(node), "shapes of its inputs are unknown, so it cannot be told for a residual", True)
        floats = [name for name in node.input if not behind_pair(wiring, name)]
        if alike and floats:
            which = "both inputs are" if len(floats) == 2 else f"input {list(node.input).index(floats[0])} is"
            yield Problem(label(node), f"residual Add of which {which} float")


def comes_from(wiring: Wiring, name: str, layers: set[int]) -> bool:
    """Whether a tensor is the result of one of the layers, behind bias, Q/DQ and changes of layout."""
    while True:
        maker = wiring.producer(name, *LAYOUT, QUANTIZE, DEQUANTIZE, "Add", *PRODUCTS)
        if maker is None or id(maker) in layers:
            return maker is not None
        data = [entry for entry in maker.input[:2] if not wiring.is_constant(entry)]
        if not data or (operator(maker) == "Add" and len(data) > 1) or operator(maker) in PRODUCTS:
            return False
        name = data[0]


def behind_pair(wiring: Wiring, name: str) -> bool:
    """Whether a tensor comes from a DQ, behind nothing but changes of layout."""
    while (maker := wiring.producer(name, *LAYOUT)) is not None:
        name = maker.input[0]
    return wiring.producer(name, DEQUANTIZE) is not None


def same_shape(left: tuple[int | str, ...] | None, right: tuple[int | str, ...] | None) -> bool | None:
    """Whether two tensors of rank 3 or more have one shape, as far as it is known; None where a rank is not."""
    if left is None or right is None:
        return None
    known = [(a, b) for a, b in zip(left, right, strict=False) if isinstance(a, int) and isinstance(b, int) and a and b]
    broadcast = any((a == 1) != (b == 1) for a, b in zip(left, right, strict=False))
    return len(left) == len(right) >= 3 and not broadcast and all(a == b for a, b in known)


def convolutions(wiring: Wiring) -> Iterator[Problem]:
    """TensorRT 8.x has sparse kernels for Conv only."""
    for weight in quantized(wiring):
        if operator(weight.node) != "Conv" and is_sparse(weight):
            yield Problem(
                label(weight.node), f"sparse {weight.node.op_type}, TensorRT 8.x has sparse kernels for Conv only"
            )


ACTIVATIONS = ("Gelu", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish",
               "Swish", "Mish", "Softplus", "Tanh", "Erf", "FastGelu", "QuickGelu", "BiasGelu")  # fmt: skip
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Clip", "Cast", "Dropout")
