"""Quantized linears as 1x1 convolutions: TensorRT 8 has sparse int8 kernels for Conv only (T20).

What: every MatMul or Gemm whose constant weight is quantized becomes a Conv with weight [N,K,1,1], scales along
axis 0 and the bias, in float, as its third input. A [B,S,K] tensor goes through it as [B,K,S,1]; the change of
layout lies before the QuantizeLinear and behind the pair that takes the output, so that Q/DQ and Conv stay
neighbours. Readers of one tensor share one change of layout, and none is made where only an activation function
lies between two convolutions.

Why [B,K,S,1]: with channels last, as int8 convolutions run, that is the memory of [B,S,K], so an engine may drop
the change. Left out: products of two activations, linears in float, and taking the layout through additions and
LayerNormalization (which work on the last axis).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.export.onnx_edit import Rewriting, known, live_scales, maker, module, stored, weight_chain

PAIR = ("QuantizeLinear", "DequantizeLinear")
UNARY = (*PAIR, "Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Cast")


class Layout(NamedTuple):
    """How a tensor of some rank becomes channels-first of rank 4, and back.

    Attributes:
        forth: permutation that puts the last axis second, () for none.
        ones: axes of size 1 that are added behind it.
        back: inverse of ``forth``.
    """

    forth: tuple[int, ...]
    ones: tuple[int, ...]
    back: tuple[int, ...]

    def turn(self, shape: ir.Shape | None) -> ir.Shape | None:
        """A shape as it is channels first."""
        if shape is None:
            return None
        sizes = [shape[axis] for axis in self.forth] if self.forth else list(shape)
        return ir.Shape(sizes + [1] * len(self.ones))


def to_conv1x1(model: ModelProto) -> ModelProto:
    """Turn the quantized linears of a graph into 1x1 convolutions.

    Args:
        model: from `sqat.export.qdq.insert_qdq`, either form of weights; left as it is.

    Returns:
        A graph that computes the same up to float rounding.

    Raises:
        ValueError: a quantized linear reads a tensor of unknown rank or of rank above 4, or is a Gemm that does
            more than multiply with [N,K] and add a bias.
    """
    rewriting = Rewriting(model)
    convolutions = Convolutions(rewriting)
    for node in list(rewriting.graph):
        if node.op_type in ("MatMul", "Gemm") and (chain := weight_chain(node.inputs[1])):
            convolutions.convert(node, chain)
    return rewriting.finish()


class Convolutions:
    """A graph being rewritten, and the channels-first twins of its tensors."""

    def __init__(self, rewriting: Rewriting) -> None:
        self.rewriting = rewriting
        self.twins: dict[ir.Value, ir.Value] = {}
        self.axes: dict[tuple[int, ...], ir.Value] = {}

    def convert(self, linear: ir.Node, chain: list[ir.Node]) -> None:
        """Replace a linear and its bias by a convolution between changes of layout."""
        x = linear.inputs[0]
        assert x is not None
        layout = layout_of(linear, x)
        turn_weight_(linear, chain, self.rewriting)
        old, bias = with_bias(linear)
        first = self.channels_first(x, layout, linear)
        new = self.rewriting.node(
            "Conv",
            [first, chain[-1].outputs[0], *bias],
            module(linear),
            before=linear,
            dtype=old.dtype,
            shape=layout.turn(old.shape),
            attributes={"kernel_shape": [1, 1]},
        )
        self.hand_on(old, new, layout, linear)

    def channels_first(self, value: ir.Value, layout: Layout, linear: ir.Node) -> ir.Value:
        """A tensor channels first; Q and DQ are taken along, and activation functions where that saves a change."""
        node = value.producer()
        alone = node is not None and len(value.uses()) == 1 and not value.is_graph_output()
        if value in self.twins:
            return self.twins[value]
        if node is not None and alone and (node.op_type in PAIR or self.behind_twin(value)):
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, self.channels_first(source, layout, linear))
            value.shape = layout.turn(value.shape)
            return value
        self.twins[value] = self.turned(value, layout, linear)
        return self.twins[value]

    def behind_twin(self, value: ir.Value | None) -> bool:
        """Whether only operators of one tensor, read by nothing else, lie between it and a change of layout back."""
        while value is not None and value not in self.twins:
            node = maker(value, *UNARY)
            if node is None or len(value.uses()) != 1 or value.is_graph_output():
                return False
            value = node.inputs[0]
        return value is not None

    def hand_on(self, old: ir.Value, new: ir.Value, layout: Layout, linear: ir.Node) -> None:
        """Give a convolution's output to a linear's readers; a Q/DQ pair reads it before the layout changes back."""
        readers = [(use.node, use.idx) for use in old.uses()]
        for node, index in readers:
            if node.op_type == "QuantizeLinear":
                node.replace_input_with(index, new)
                end = behind_pairs(node)
                self.hand_back(end, end, [(use.node, use.idx) for use in end.uses()], layout, linear)
        others = [(node, index) for node, index in readers if node.op_type != "QuantizeLinear"]
        if others or old.is_graph_output():
            self.hand_back(old, new, others, layout, linear)

    def hand_back(
        self, old: ir.Value, new: ir.Value, readers: list[tuple[ir.Node, int]], layout: Layout, linear: ir.Node
    ) -> None:
        """Let readers of ``old``, and the graph's output, have ``new`` with the channels last again."""
        back = new
        if layout.ones:
            back = self.step("Squeeze", [back, self.constant_axes(layout.ones)], linear)
        if layout.back:
            back = self.step("Transpose", [back], linear, perm=layout.back)
        back.shape = old.shape
        if old is new:
            old.shape = layout.turn(old.shape)
        self.twins[back] = new
        for node, index in readers:
            node.replace_input_with(index, back)
        if old.is_graph_output():
            outputs = self.rewriting.graph.outputs
            outputs[outputs.index(old)] = back
            old.name, back.name = self.rewriting.free(str(old.name)), old.name

    def turned(self, value: ir.Value, layout: Layout, linear: ir.Node) -> ir.Value:
        """Add the change of layout of a tensor."""
        first = value
        if layout.forth:
            first = self.step("Transpose", [first], linear, perm=layout.forth)
        if layout.ones:
            first = self.step("Unsqueeze", [first, self.constant_axes(layout.ones)], linear)
        first.shape = layout.turn(value.shape)
        return first

    def step(self, op: str, inputs: list[ir.Value], linear: ir.Node, perm: tuple[int, ...] = ()) -> ir.Value:
        """One node of a change of layout, named after the linear that needs it."""
        attributes = {"perm": perm} if perm else {}
        return self.rewriting.node(
            op, inputs, module(linear), before=linear, dtype=inputs[0].dtype, attributes=attributes
        )

    def constant_axes(self, axes: tuple[int, ...]) -> ir.Value:
        """One constant for all changes of a kind."""
        if axes not in self.axes:
            self.axes[axes] = self.rewriting.constant("conv1x1_axes", np.array(axes, np.int64))
        return self.axes[axes]


def layout_of(linear: ir.Node, x: ir.Value) -> Layout:
    """Layout change for the rank of a linear's input, which the graph declares before the Q/DQ pairs."""
    while x.shape is None and (pair := maker(x, *PAIR)) is not None and pair.inputs[0] is not None:
        x = pair.inputs[0]
    rank = None if x.shape is None else len(x.shape)
    if rank not in LAYOUTS:
        raise ValueError(f"{linear.name} reads a tensor of rank {rank}, a 1x1 convolution needs one of {[*LAYOUTS]}")
    return LAYOUTS[rank]


def turn_weight_(linear: ir.Node, chain: list[ir.Node], rewriting: Rewriting) -> None:
    """Store a linear's weight as [N,K,1,1], scales along axis 0."""
    settings = {name: entry.value for name, entry in linear.attributes.items()}
    transposed = bool(settings.pop("transB", 0))
    if settings.pop("transA", 0) or set(settings.values()) - {1.0}:
        raise ValueError(f"{linear.name} has {settings}, a 1x1 convolution needs alpha = beta = 1 and no transA")
    (weight, array), (scale, scales) = known(chain[0].inputs[0]), known(chain[0].inputs[1])
    kernel = np.ascontiguousarray(array if transposed else array.T)[:, :, None, None]
    chain[0].replace_input_with(0, rewriting.constant(str(weight.name), kernel))
    # ONNX Runtime divides the bias by the scale, which overflows where a dead channel's is tiny
    raised = rewriting.constant(str(scale.name), live_scales(kernel, scales, 0))
    for node in chain:
        node.replace_input_with(1, raised)
        node.attributes["axis"] = ir.AttrInt64("axis", 0)


def with_bias(linear: ir.Node) -> tuple[ir.Value, list[ir.Value]]:
    """What leaves a linear behind its bias, and the bias [N] if it has one."""
    output = linear.outputs[0]
    if linear.op_type == "Gemm":
        return output, [value for value in linear.inputs[2:] if value is not None]
    readers = [use.node for use in output.uses()]
    if len(readers) == 1 and readers[0].op_type == "Add" and not output.is_graph_output():
        other = next((value for value in readers[0].inputs if value is not output), None)
        constant = stored(other)
        if other is not None and constant is not None and constant.ndim == 1:
            return readers[0].outputs[0], [other]
    return output, []


def behind_pairs(quantizer: ir.Node) -> ir.Value:
    """What comes out of a Q and the Q/DQ that alone read on from it."""
    value = quantizer.outputs[0]
    while len(uses := list(value.uses())) == 1 and uses[0].node.op_type in PAIR:
        value = uses[0].node.outputs[0]
    return value


LAYOUTS = {
    2: Layout((), (2, 3), ()),
    3: Layout((0, 2, 1), (3,), (0, 2, 1)),
    4: Layout((0, 3, 1, 2), (), (0, 2, 3, 1)),
}
