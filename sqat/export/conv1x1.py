"""Turn quantized linears into 1x1 convolutions: TensorRT 8 has sparse int8 kernels for Conv only (T20).

A tensor [B,S,K] goes through a convolution as [B,K,S,1], which in channels-last memory is [B,S,K]: an engine may drop
the change of layout. It lies outside the Q/DQ pairs, so that these and Conv stay neighbours. Products of two
activations and float linears stay.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.export.onnx_edit import (
    GraphEditor,
    constant_value,
    module_name,
    only_reader,
    producer,
    raise_dead_scales,
    require_constant,
    weight_chain,
)

PAIR = ("QuantizeLinear", "DequantizeLinear")
UNARY = (*PAIR, "Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Cast")
Reader = tuple[ir.Node, int]  # a node, and the input that it reads


class Layout(NamedTuple):
    """How a tensor of one rank becomes channels first with rank 4, and back.

    Attributes:
        forward: permutation that puts the last axis second, () for none.
        ones: axes of size 1 that are added after it.
        backward: inverse of ``forward``.
    """

    forward: tuple[int, ...]
    ones: tuple[int, ...]
    backward: tuple[int, ...]

    def apply(self, shape: ir.Shape | None) -> ir.Shape | None:
        """Compute the channels-first shape."""
        if shape is None:
            return None
        sizes = [shape[axis] for axis in self.forward] if self.forward else list(shape)
        return ir.Shape(sizes + [1] * len(self.ones))


def to_conv1x1(model: ModelProto) -> ModelProto:
    """Turn the quantized linears of a graph into 1x1 convolutions.

    Args:
        model: from `sqat.export.qdq.insert_qdq`, with either form of weights; is not changed.

    Returns:
        A graph that computes the same up to float rounding.

    Raises:
        ValueError: a quantized linear reads a tensor of unknown rank or of rank above 4, or is a Gemm that does
            more than multiply with [N,K] and add a bias.
    """
    editor = GraphEditor(model)
    converter = Conv1x1Converter(editor)
    for node in list(editor.graph):
        if node.op_type in ("MatMul", "Gemm") and (chain := weight_chain(node.inputs[1])):
            converter.convert(node, chain)
    return editor.finish()


class Conv1x1Converter:
    """A graph under change, and the channels-first copies of its tensors."""

    def __init__(self, editor: GraphEditor) -> None:
        self.editor = editor
        self.copies: dict[ir.Value, ir.Value] = {}
        self.axes: dict[tuple[int, ...], ir.Value] = {}

    def convert(self, linear: ir.Node, chain: list[ir.Node]) -> None:
        """Replace a linear and its bias by a convolution between changes of layout."""
        x = linear.inputs[0]
        assert x is not None
        layout = layout_of(linear, x)
        reshape_weight_(linear, chain, self.editor)
        old, bias = split_bias(linear)
        first = self.channels_first(x, layout, linear)
        new = self.editor.add_node(
            "Conv",
            [first, chain[-1].outputs[0], *bias],
            module_name(linear),
            before=linear,
            dtype=old.dtype,
            shape=layout.apply(old.shape),
            attributes={"kernel_shape": [1, 1]},
        )
        self.connect(old, new, layout, linear)

    def channels_first(self, value: ir.Value, layout: Layout, linear: ir.Node) -> ir.Value:
        """Get a tensor channels first; Q, DQ and activation functions move behind the change where that saves one."""
        if value in self.copies:
            return self.copies[value]
        node = value.producer()
        if node is not None and only_reader(value) and (node.op_type in PAIR or self.leads_to_copy(value)):
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, self.channels_first(source, layout, linear))
            value.shape = layout.apply(value.shape)
            return value
        self.copies[value] = self.add_forward(value, layout, linear)
        return self.copies[value]

    def leads_to_copy(self, value: ir.Value | None) -> bool:
        """Whether only operators of one tensor, read by nothing else, lie between a value and a change of layout."""
        while value is not None and value not in self.copies:
            node = producer(value, *UNARY)
            if node is None or only_reader(value) is None:
                return False
            value = node.inputs[0]
        return value is not None

    def connect(self, old: ir.Value, new: ir.Value, layout: Layout, linear: ir.Node) -> None:
        """Give a convolution's output to a linear's readers; a Q/DQ pair reads it before the layout changes back."""
        readers = [(use.node, use.idx) for use in old.uses()]
        for node, index in readers:
            if node.op_type == "QuantizeLinear":
                node.replace_input_with(index, new)
                end = end_of_pairs(node)
                self.connect_back(end, end, [(use.node, use.idx) for use in end.uses()], layout, linear)
        others = [(node, index) for node, index in readers if node.op_type != "QuantizeLinear"]
        if others or old.is_graph_output():
            self.connect_back(old, new, others, layout, linear)

    def connect_back(
        self, old: ir.Value, new: ir.Value, readers: list[Reader], layout: Layout, linear: ir.Node
    ) -> None:
        """Give ``new``, with channels last again, to readers of ``old`` and to the graph's output."""
        back = new
        if layout.ones:
            back = self.add_step("Squeeze", [back, self.axes_constant(layout.ones)], linear)
        if layout.backward:
            back = self.add_step("Transpose", [back], linear, perm=layout.backward)
        back.shape = old.shape
        if old is new:
            old.shape = layout.apply(old.shape)
        self.copies[back] = new
        for node, index in readers:
            node.replace_input_with(index, back)
        if old.is_graph_output():
            outputs = self.editor.graph.outputs
            outputs[outputs.index(old)] = back
            old.name, back.name = self.editor.free_name(str(old.name)), old.name

    def add_forward(self, value: ir.Value, layout: Layout, linear: ir.Node) -> ir.Value:
        """Add the change of a tensor's layout to channels first."""
        first = value
        if layout.forward:
            first = self.add_step("Transpose", [first], linear, perm=layout.forward)
        if layout.ones:
            first = self.add_step("Unsqueeze", [first, self.axes_constant(layout.ones)], linear)
        first.shape = layout.apply(value.shape)
        return first

    def add_step(self, op: str, inputs: list[ir.Value], linear: ir.Node, perm: tuple[int, ...] = ()) -> ir.Value:
        """Add one node of a change of layout, named after the linear that needs it."""
        attributes = {"perm": perm} if perm else {}
        name, dtype = module_name(linear), inputs[0].dtype
        return self.editor.add_node(op, inputs, name, before=linear, dtype=dtype, attributes=attributes)

    def axes_constant(self, axes: tuple[int, ...]) -> ir.Value:
        """Get the one constant for all changes of a kind."""
        if axes not in self.axes:
            self.axes[axes] = self.editor.add_constant("conv1x1_axes", np.array(axes, np.int64))
        return self.axes[axes]


def layout_of(linear: ir.Node, x: ir.Value) -> Layout:
    """Choose the layout change by the rank of a linear's input, which the graph declares before the Q/DQ pairs."""
    while x.shape is None and (pair := producer(x, *PAIR)) is not None and pair.inputs[0] is not None:
        x = pair.inputs[0]
    rank = None if x.shape is None else len(x.shape)
    if rank not in LAYOUTS:
        raise ValueError(f"{linear.name} reads a tensor of rank {rank}, a 1x1 convolution needs one of {[*LAYOUTS]}")
    return LAYOUTS[rank]


def reshape_weight_(linear: ir.Node, chain: list[ir.Node], editor: GraphEditor) -> None:
    """Store a linear's weight as [N,K,1,1], with scales along axis 0."""
    settings = {name: entry.value for name, entry in linear.attributes.items()}
    transposed = bool(settings.pop("transB", 0))
    if settings.pop("transA", 0) or set(settings.values()) - {1.0}:
        raise ValueError(f"{linear.name} has {settings}, a 1x1 convolution needs alpha = beta = 1 and no transA")
    (weight, array), (scale, scales) = require_constant(chain[0].inputs[0]), require_constant(chain[0].inputs[1])
    kernel = np.ascontiguousarray(array if transposed else array.T)[:, :, None, None]
    chain[0].replace_input_with(0, editor.add_constant(str(weight.name), kernel))
    # ONNX Runtime divides the bias by the scale, which overflows where a dead channel's is tiny
    raised = editor.add_constant(str(scale.name), raise_dead_scales(kernel, scales, 0))
    for node in chain:
        node.replace_input_with(1, raised)
        node.attributes["axis"] = ir.AttrInt64("axis", 0)


def split_bias(linear: ir.Node) -> tuple[ir.Value, list[ir.Value]]:
    """Get what leaves a linear after its bias, and the bias [N] if there is one."""
    output = linear.outputs[0]
    if linear.op_type == "Gemm":
        return output, [value for value in linear.inputs[2:] if value is not None]
    reader = only_reader(output)
    if reader is not None and reader.op_type == "Add":
        other = next((value for value in reader.inputs if value is not output), None)
        constant = constant_value(other)
        if other is not None and constant is not None and constant.ndim == 1:
            return reader.outputs[0], [other]
    return output, []


def end_of_pairs(quantizer: ir.Node) -> ir.Value:
    """Get what leaves a Q and the Q/DQ that alone read on from it."""
    value = quantizer.outputs[0]
    while len(uses := list(value.uses())) == 1 and uses[0].node.op_type in PAIR:
        value = uses[0].node.outputs[0]
    return value


LAYOUTS = {
    2: Layout((), (2, 3), ()),
    3: Layout((0, 2, 1), (3,), (0, 2, 1)),
    4: Layout((0, 3, 1, 2), (), (0, 2, 3, 1)),
}
