"""A graph in float16 whose types are all spelled out, as strongly typed engines read it (T18).

What: `to_float16` makes half precision of everything that descends from an embedding or a float input, weights
and constants with it. Float32 stays, behind Casts:
  * what integers alone decide (masks, positions, rotary angles, relative buckets): half holds integers up to 2048
    only, so a position or an angle would be wrong; the result is cast once for all its readers. A mask's -3.4e38
    becomes -32768: half's lowest, -65504, plus a score below -16 is -inf, and a row of nothing else is NaN.
  * norms, sums and powers: squares pass 65504 at 256. An engine may say that it sums in float32 anyway
    (``stash_type``), not all do; a quantizer behind it reads the float32, the rest one Cast.
  * what leads to a sine or cosine from a float input (times of a diffusion model), by the same reason.
  * an operation with a number that half cannot hold (an epsilon), and a quantized product one of whose scales is
    below half's smallest normal number: product and bias in float32, so that nothing comes between DQ and product.
Q has the type of its input, DQ that of its reader. Inputs keep their types, float outputs are float32.

Left out: bfloat16, and choosing layers by their ranges. A float weight below 2^-25 becomes zero, one below 2^-14
loses bits; engines may take such subnormals for zero. Zeros stay zeros, and none is -0.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.errors import SqatError
from sqat.export.onnx_edit import Array, Rewriting, known, live_scales, maker, module, stored, weight_chain

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
STORED: dict[ir.DataType | None, np.dtype[Any]] = {FLOAT: np.dtype(np.float32), HALF: np.dtype(np.float16)}
LARGEST, SMALLEST_NORMAL, SMALLEST_SCALE = 65504.0, 2.0**-14, 6.2e-5
MASKED, MASK = 1e38, 32768.0
PRODUCTS = ("MatMul", "Gemm", "Conv")
NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
IN_FLOAT = (*NORMS, "Pow", "Sqrt", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
NO_FLOATS = ("QuantizeLinear", "Shape", "Size")


def to_float16(model: ModelProto) -> ModelProto:
    """Turn a float32 graph, with or without Q/DQ pairs, into a float16 one.

    Args:
        model: left as it is; its tensors declare their types, as `sqat.export.graph` leaves them.

    Returns:
        Same inputs and outputs; the types between are explicit and agree at every operator.

    Raises:
        SqatError: a weight or constant does not fit half precision.
    """
    halving = Halving(Rewriting(model))
    for node in list(halving.rewriting.graph):
        halving.visit(node)
    halving.restore_outputs()
    return halving.rewriting.finish()


class Halving:
    """A graph on its way to half precision: what descends from embeddings, and which nodes stay in float32."""

    def __init__(self, rewriting: Rewriting) -> None:
        self.rewriting = rewriting
        self.active = {value for value in rewriting.graph.inputs if value.dtype == FLOAT}
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.in_float = {node for node in rewriting.graph if stays_float(node)} | angles(rewriting.graph)
        self.in_float |= {bias for node in self.in_float if node.op_type in PRODUCTS for bias in biases(node)}

    def visit(self, node: ir.Node) -> None:
        """Give a node its type; its inputs have theirs already."""
        if not looks_up(node) and not self.active & set(node.inputs):
            self.soften(node)
            return
        wanted = self.wanted(node)
        for index, value in enumerate(node.inputs):
            if value is not None and node.op_type not in ("Shape", "Size") and (node.op_type != "Resize" or index == 0):
                node.replace_input_with(index, self.operand(value, wanted))
        if node.op_type == "QuantizeLinear" and wanted == FLOAT:
            self.match_scale(node)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", wanted)
        for output in node.outputs:
            if output.dtype in STORED or (output.dtype is None and node.op_type not in NO_FLOATS):
                output.dtype = wanted
                self.active.add(output)
            elif node.op_type in ("QuantizeLinear", "Gather"):
                self.active.add(output)

    def soften(self, node: ir.Node) -> None:
        """Bring mask constants of a node that stays in float32 into half's range."""
        for index, value in enumerate(node.inputs):
            array = stored(value)
            if value is not None and array is not None and array.dtype == np.float32:
                node.replace_input_with(index, self.constant(value, array, FLOAT))
        filler = node.attributes["value"].as_tensor().numpy() if node.op_type == "ConstantOfShape" else None
        if filler is not None and filler.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(softened(filler)))

    def wanted(self, node: ir.Node) -> ir.DataType:
        """The float type in which a node computes."""
        small = node.op_type in ("QuantizeLinear", "DequantizeLinear") and too_small(node)
        source = node.inputs[0]
        if node.op_type == "QuantizeLinear":
            return FLOAT if small or (source is not None and source.dtype == FLOAT) else HALF
        if node.op_type == "DequantizeLinear":
            return FLOAT if small or {use.node for use in node.outputs[0].uses()} & self.in_float else HALF
        return FLOAT if node in self.in_float else HALF

    def operand(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """What a node reads instead of a value: itself, a constant of another type, or a Cast."""
        array = stored(value)
        if chain := weight_chain(value):
            self.retype_weight(chain, wanted)
            return value
        if array is not None:
            return self.constant(value, array, wanted) if array.dtype in STORED.values() else value
        return self.cast(value, wanted) if value.dtype in STORED else value

    def cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A tensor in a type, cast once for all its readers."""
        if value.dtype == wanted:
            return value
        if (value, wanted) not in self.made:
            node = value.producer()
            self.made[value, wanted] = self.rewriting.node(
                "Cast",
                [value],
                module(node) if node is not None else "",
                before=next(iter(value.uses())).node,
                dtype=wanted,
                shape=value.shape,
                attributes={"to": wanted},
            )
        return self.made[value, wanted]

    def constant(self, value: ir.Value, array: Array, wanted: ir.DataType) -> ir.Value:
        """A stored tensor in a type, within half's range; made once."""
        if (value, wanted) not in self.made:
            fitting = half(array, str(value.name)) if wanted == HALF else softened(array.astype(np.float32, copy=False))
            same = fitting is array
            self.made[value, wanted] = value if same else self.rewriting.constant(str(value.name), fitting)
        return self.made[value, wanted]

    def retype_weight(self, chain: list[ir.Node], wanted: ir.DataType) -> None:
        """Put a quantized weight's scales, and its floats if it has them, into a type; its int8 values stay."""
        (weight, array), (scale, scales) = known(chain[0].inputs[0]), known(chain[0].inputs[1])
        typed = live_scales(array, scales, axis_of(chain[0])).astype(STORED[wanted])
        if array.dtype != np.int8:
            along = [-1 if axis == axis_of(chain[0]) else 1 for axis in range(array.ndim)]
            integers = np.rint(array / scales.reshape(along))
            floats = (integers * typed.reshape(along) + 0).astype(typed.dtype)
            chain[0].replace_input_with(0, self.rewriting.constant(str(weight.name), floats))
        constant = self.rewriting.constant(str(scale.name), typed)
        for node in chain:
            node.replace_input_with(1, constant)
        chain[-1].outputs[0].dtype = wanted

    def match_scale(self, quantizer: ir.Node) -> None:
        """Let a Q in float32 divide by the number that its DQ in half multiplies with."""
        scale, array = known(quantizer.inputs[1])
        if {self.wanted(use.node) for use in quantizer.outputs[0].uses()} == {HALF}:
            rounded = half(array, str(scale.name)).astype(np.float32)
            quantizer.replace_input_with(1, self.rewriting.constant(str(scale.name), rounded))

    def restore_outputs(self) -> None:
        """Cast the graph's outputs back to float32, under their names."""
        for index, value in enumerate(self.rewriting.graph.outputs):
            if value.dtype == HALF:
                node, name = value.producer(), value.name
                assert node is not None
                value.name = self.rewriting.free(f"{name}_half")
                restored = self.rewriting.node(
                    "Cast", [value], module(node), after=node, dtype=FLOAT, shape=value.shape, attributes={"to": FLOAT}
                )
                restored.name = name
                self.rewriting.graph.outputs[index] = restored


def stays_float(node: ir.Node) -> bool:
    """Whether a node has to compute in float32: by what it does, or for a number that half does not hold."""
    if node.op_type in (*PRODUCTS, "Gather"):
        return any((pair := maker(value, "DequantizeLinear")) is not None and too_small(pair) for value in node.inputs)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    numbers = [array for value in node.inputs if (array := stored(value)) is not None and array.size == 1]
    return node.op_type in IN_FLOAT or any(0 < abs(float(number.reshape(()))) < SMALLEST_NORMAL for number in numbers)


def angles(graph: ir.Graph) -> set[ir.Node]:
    """Sines and cosines, and what leads to them, back to the nearest products."""
    found: set[ir.Node] = set()
    waiting = [node for node in graph if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        if node in found or node.op_type in PRODUCTS:
            continue
        found.add(node)
        waiting += [made for value in node.inputs if value is not None and (made := value.producer()) is not None]
    return found


def looks_up(node: ir.Node) -> bool:
    """Whether a node reads rows of a stored table of floats or int8."""
    if node.op_type != "Gather":
        return False
    chain = weight_chain(node.inputs[0])
    table = stored(chain[0].inputs[0] if chain else node.inputs[0])
    return table is not None and table.ndim > 1 and table.dtype in (*STORED.values(), np.int8)


def biases(product: ir.Node) -> list[ir.Node]:
    """The Add of a constant that alone follows a product."""
    readers = [use.node for use in product.outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "Add":
        return []
    return readers if any(stored(value) is not None for value in readers[0].inputs) else []


def too_small(node: ir.Node) -> bool:
    """Whether a scale of a Q or DQ lies below half's normal numbers, channels of nothing but zeros apart."""
    scales = stored(node.inputs[1])
    chain = weight_chain(node.outputs[0])
    if scales is not None and chain:
        scales = live_scales(known(chain[0].inputs[0])[1], scales, axis_of(node))
    return scales is not None and bool(scales.min(initial=1) < SMALLEST_SCALE)


def axis_of(node: ir.Node) -> int:
    """Axis of a Q's or DQ's scales."""
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1


def softened(array: Array) -> Array:
    """Float32's ends (what masks add to a score) as +-32768; the array itself where there are none."""
    ends = np.isfinite(array) & (np.abs(array) > MASKED)
    return np.asarray(np.where(ends, np.copysign(np.float32(MASK), array), array)) if ends.any() else array


def half(array: Array, name: str) -> Array:
    """Numbers in half precision, zeros positive."""
    if array.dtype == np.float16:
        return array
    fitting = softened(array)
    largest = float(np.abs(fitting).max(where=np.isfinite(fitting), initial=0))
    if largest > LARGEST:
        raise SqatError(f"{name} holds {largest:g}, float16 ends at {LARGEST:g}", "export it in float32")
    return np.asarray(fitting.astype(np.float16) + np.float16(0))
