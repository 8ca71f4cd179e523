"""Convert a graph to float16 with explicit types, as strongly typed engines read it (T18).

What descends from an embedding or a float input becomes float16. Float32 stays, behind Casts, where float16 would be
wrong: masks and positions, norms and sums, inputs of a sine or cosine, numbers below float16's smallest normal
one. Zeros stay zeros, and none is -0.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.errors import SqatError
from sqat.export.onnx_edit import (
    Array,
    GraphEditor,
    constant_value,
    module_name,
    producer,
    raise_dead_scales,
    require_constant,
    weight_chain,
)

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
NUMPY_TYPES: dict[ir.DataType | None, np.dtype[Any]] = {FLOAT: np.dtype(np.float32), HALF: np.dtype(np.float16)}
LARGEST, SMALLEST_NORMAL, SMALLEST_SCALE = 65504.0, 2.0**-14, 6.2e-5
# A mask of -3.4e38 becomes -32768: float16's lowest, -65504, plus a score below -16 is -inf, and a row of these is NaN.
MASKED, MASK = 1e38, 32768.0
PRODUCTS = ("MatMul", "Gemm", "Conv")
NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
FLOAT_OPS = (*NORMS, "Pow", "Sqrt", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")  # 256^2 > 65504
NO_FLOAT_OUTPUT = ("QuantizeLinear", "Shape", "Size")


def to_float16(model: ModelProto) -> ModelProto:
    """Convert a float32 graph, with or without Q/DQ pairs.

    Args:
        model: declares the types of its tensors, as `sqat.export.graph` leaves them; is not changed.

    Returns:
        A graph with the same inputs and outputs; the types between agree at every operator.

    Raises:
        SqatError: a weight or constant does not fit float16.
    """
    converter = Float16Converter(GraphEditor(model))
    for node in list(converter.editor.graph):
        converter.convert(node)
    converter.restore_outputs()
    return converter.editor.finish()


class Float16Converter:
    """A graph under conversion: the values that descend from embeddings, and the nodes that stay in float32."""

    def __init__(self, editor: GraphEditor) -> None:
        self.editor = editor
        self.descendants = {value for value in editor.graph.inputs if value.dtype == FLOAT}
        self.copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.float_nodes = {node for node in editor.graph if needs_float32(node)} | angle_nodes(editor.graph)
        # A product's bias adds in the product's type, so that nothing comes between them.
        self.float_nodes |= {add for node in self.float_nodes if node.op_type in PRODUCTS for add in bias_adds(node)}

    def convert(self, node: ir.Node) -> None:
        """Convert one node; the nodes before it are converted."""
        if not is_lookup(node) and not self.descendants & set(node.inputs):
            self.limit_masks(node)
            return
        dtype = self.compute_type(node)
        for index, value in enumerate(node.inputs):
            if value is not None and node.op_type not in ("Shape", "Size") and (node.op_type != "Resize" or index == 0):
                node.replace_input_with(index, self.in_type(value, dtype))
        if node.op_type == "QuantizeLinear" and dtype == FLOAT:
            self.match_scale(node)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
        for output in node.outputs:
            if output.dtype in NUMPY_TYPES or (output.dtype is None and node.op_type not in NO_FLOAT_OUTPUT):
                output.dtype = dtype
                self.descendants.add(output)
            elif node.op_type in ("QuantizeLinear", "Gather"):
                self.descendants.add(output)

    def limit_masks(self, node: ir.Node) -> None:
        """Bring mask constants of a node that stays in float32 into float16's range."""
        for index, value in enumerate(node.inputs):
            array = constant_value(value)
            if value is not None and array is not None and array.dtype == np.float32:
                node.replace_input_with(index, self.constant_in_type(value, array, FLOAT))
        filler = node.attributes["value"].as_tensor().numpy() if node.op_type == "ConstantOfShape" else None
        if filler is not None and filler.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(limit(filler)))

    def compute_type(self, node: ir.Node) -> ir.DataType:
        """Choose the float type in which a node computes: Q that of its input, DQ that of its reader."""
        small = node.op_type in ("QuantizeLinear", "DequantizeLinear") and has_small_scale(node)
        source = node.inputs[0]
        if node.op_type == "QuantizeLinear":
            return FLOAT if small or (source is not None and source.dtype == FLOAT) else HALF
        if node.op_type == "DequantizeLinear":
            return FLOAT if small or {use.node for use in node.outputs[0].uses()} & self.float_nodes else HALF
        return FLOAT if node in self.float_nodes else HALF

    def in_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Get a value in a type: itself, a constant of that type, or a Cast."""
        array = constant_value(value)
        if chain := weight_chain(value):
            self.retype_weight(chain, dtype)
            return value
        if array is not None:
            return self.constant_in_type(value, array, dtype) if array.dtype in NUMPY_TYPES.values() else value
        return self.cast(value, dtype) if value.dtype in NUMPY_TYPES else value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast a tensor once for all its readers."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.copies:
            node = value.producer()
            self.copies[value, dtype] = self.editor.add_node(
                "Cast",
                [value],
                module_name(node) if node is not None else "",
                before=next(iter(value.uses())).node,
                dtype=dtype,
                shape=value.shape,
                attributes={"to": dtype},
            )
        return self.copies[value, dtype]

    def constant_in_type(self, value: ir.Value, array: Array, dtype: ir.DataType) -> ir.Value:
        """Store a tensor once in a type, within float16's range."""
        if (value, dtype) not in self.copies:
            name = str(value.name)
            limited = to_half(array, name) if dtype == HALF else limit(array.astype(np.float32, copy=False))
            self.copies[value, dtype] = value if limited is array else self.editor.add_constant(name, limited)
        return self.copies[value, dtype]

    def retype_weight(self, chain: list[ir.Node], dtype: ir.DataType) -> None:
        """Convert a quantized weight's scales, and its floats if it has them; its int8 values stay."""
        (weight, array), (scale, scales) = require_constant(chain[0].inputs[0]), require_constant(chain[0].inputs[1])
        axis = scale_axis(chain[0])
        converted = raise_dead_scales(array, scales, axis).astype(NUMPY_TYPES[dtype])
        if array.dtype != np.int8:
            along = [-1 if other == axis else 1 for other in range(array.ndim)]
            integers = np.rint(array / scales.reshape(along))
            floats = (integers * converted.reshape(along) + 0).astype(converted.dtype)
            chain[0].replace_input_with(0, self.editor.add_constant(str(weight.name), floats))
        constant = self.editor.add_constant(str(scale.name), converted)
        for node in chain:
            node.replace_input_with(1, constant)
        chain[-1].outputs[0].dtype = dtype

    def match_scale(self, quantizer: ir.Node) -> None:
        """Let a Q in float32 divide by the number that its DQ in float16 multiplies with."""
        scale, array = require_constant(quantizer.inputs[1])
        if {self.compute_type(use.node) for use in quantizer.outputs[0].uses()} == {HALF}:
            rounded = to_half(array, str(scale.name)).astype(np.float32)
            quantizer.replace_input_with(1, self.editor.add_constant(str(scale.name), rounded))

    def restore_outputs(self) -> None:
        """Cast the graph's outputs back to float32, under their names."""
        outputs = self.editor.graph.outputs
        for index, value in enumerate(outputs):
            if value.dtype == HALF:
                node, name = value.producer(), value.name
                assert node is not None
                value.name = self.editor.free_name(f"{name}_half")
                restored = self.editor.add_node("Cast", [value], module_name(node), after=node, dtype=FLOAT,
                                                shape=value.shape, attributes={"to": FLOAT})  # fmt: skip
                restored.name = name
                outputs[index] = restored


def needs_float32(node: ir.Node) -> bool:
    """Whether a node must compute in float32: by its operator, or for a number that float16 does not hold."""
    if node.op_type in (*PRODUCTS, "Gather"):
        pairs = (producer(value, "DequantizeLinear") for value in node.inputs)
        return any(pair is not None and has_small_scale(pair) for pair in pairs)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    numbers = [array for value in node.inputs if (array := constant_value(value)) is not None and array.size == 1]
    return node.op_type in FLOAT_OPS or any(0 < abs(float(number.reshape(()))) < SMALLEST_NORMAL for number in numbers)


def angle_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Find sines and cosines and what leads to them, back to the nearest products."""
    nodes: set[ir.Node] = set()
    pending = [node for node in graph if node.op_type in ("Sin", "Cos")]
    while pending:
        node = pending.pop()
        if node in nodes or node.op_type in PRODUCTS:
            continue
        nodes.add(node)
        pending += [before for value in node.inputs if (before := producer(value)) is not None]
    return nodes


def is_lookup(node: ir.Node) -> bool:
    """Whether a node reads rows of a stored table of floats or int8."""
    if node.op_type != "Gather":
        return False
    chain = weight_chain(node.inputs[0])
    table = constant_value(chain[0].inputs[0] if chain else node.inputs[0])
    return table is not None and table.ndim > 1 and table.dtype in (*NUMPY_TYPES.values(), np.int8)


def bias_adds(product: ir.Node) -> list[ir.Node]:
    """List the Add of a constant that alone follows a product; empty where there is none."""
    uses = list(product.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return []
    add = uses[0].node
    return [add] if any(constant_value(value) is not None for value in add.inputs) else []


def has_small_scale(node: ir.Node) -> bool:
    """Whether a scale of a Q or DQ lies below float16's normal numbers, apart from all-zero channels."""
    scales = constant_value(node.inputs[1])
    chain = weight_chain(node.outputs[0])
    if scales is not None and chain:
        scales = raise_dead_scales(require_constant(chain[0].inputs[0])[1], scales, scale_axis(node))
    return scales is not None and bool(scales.min(initial=1) < SMALLEST_SCALE)


def scale_axis(node: ir.Node) -> int:
    """Get the axis of a Q's or DQ's scales."""
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1


def limit(array: Array) -> Array:
    """Replace float32's ends, which masks add to a score, by +-32768; return the same array where there are none."""
    ends = np.isfinite(array) & (np.abs(array) > MASKED)
    return np.asarray(np.where(ends, np.copysign(np.float32(MASK), array), array)) if ends.any() else array


def to_half(array: Array, name: str) -> Array:
    """Round numbers to float16, zeros positive.

    Raises:
        SqatError: a number is too large.
    """
    if array.dtype == np.float16:
        return array
    limited = limit(array)
    largest = float(np.abs(limited).max(where=np.isfinite(limited), initial=0))
    if largest > LARGEST:
        raise SqatError(f"{name} holds {largest:g}, float16 ends at {LARGEST:g}", "export it in float32",
                        code="unsupported-model")  # fmt: skip
    return np.asarray(limited.astype(np.float16) + np.float16(0))
