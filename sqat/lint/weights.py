"""The constant operand of a product: where it is stored, what it passes on its way, and its values as the product
reads them.

Values are the integers the product multiplies: those stored, or those that a QuantizeLinear makes of a float weight,
less the zero-point, so that a pruned weight is 0 whatever the type; a float weight is itself. Transposes and
reshapes on the way are carried out, so that axes are always those of the operator (rule B5). Left out: weights as
the first operand of a MatMul, packed weights of a runtime's own operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

Array = NDArray[np.generic]
Dims = tuple[int, ...]
STEPS = ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, *HALF)
LOW, HIGH = -128, 127


class Operands(NamedTuple):
    """Which input of an operator is its weight, and which the weight's zero-point (None: none)."""

    operand: int
    point: int | None = None

    def zero_point(self, node: NodeProto) -> str:
        """Name of the zero-point, empty where there is none."""
        return node.input[self.point] if self.point is not None and len(node.input) > self.point else ""


@dataclass(frozen=True)
class Weight:
    """The constant operand of a product.

    Attributes:
        node: the product.
        name: the tensor in the graph that holds it.
        stored: its initializer, int8 or float.
        steps: nodes between initializer and product, in order of execution.
        dims: shape as stored and behind each step.
        quantizer: the QuantizeLinear of a weight that is stored as float (rule B4, form Q -> DQ).
        dequantizer: the DequantizeLinear it passes, None for a float weight.
        scale: scales of the quantizer or dequantizer, None where they are not constant.
        zero_point: of the same, or of the integer product itself.
        out: axis of the output channels as the product reads the weight.
        reduction: axis that is summed over, likewise.
    """

    node: NodeProto
    name: str
    stored: TensorProto
    steps: tuple[NodeProto, ...]
    dims: tuple[Dims, ...]
    quantizer: NodeProto | None
    dequantizer: NodeProto | None
    scale: Array | None
    zero_point: Array | None
    out: int
    reduction: int

    @property
    def size(self) -> tuple[int, int]:
        """Inputs and outputs of the product (K, N)."""
        return self.dims[-1][self.reduction], self.dims[-1][self.out]

    @property
    def passage(self) -> list[tuple[NodeProto, Dims, Dims]]:
        """Each step with the shape before and behind it."""
        return list(zip(self.steps, self.dims[:-1], self.dims[1:], strict=True))

    @property
    def axis(self) -> int | None:
        """Axis of the scales in the shape of the dequantized weight; None for one scale, or where an axis is wrong."""
        return scale_axis(self.dequantizer, self.scale, self.dims[self.place(self.dequantizer)])

    @property
    def read_axis(self) -> int | None:
        """The axis of the scales as the product reads the weight; None where a reshape breaks it up."""
        axis = self.axis
        for step, before, after in self.passage[self.place(self.dequantizer) :]:
            axis = moved_axis(step, axis, before, after) if axis is not None else None
        return axis

    def place(self, node: NodeProto | None) -> int:
        """Index of a step's input shape in ``dims``; 0 for none."""
        return next((index for index, step in enumerate(self.steps) if step is node), 0)

    @cached_property
    def values(self) -> Array:
        """The weight as the product reads it: integers less the zero-point where it is quantized, else floats."""
        values: Array = numpy_helper.to_array(self.stored)
        source = self.quantizer if self.quantizer is not None else self.dequantizer
        if source is None:
            values = centred(values, self.zero_point, self.out)
        for step, before, after in self.passage:
            if step is source:
                axis = scale_axis(step, self.scale, before)
                if step is self.quantizer:
                    values = rounded(values, self.scale, axis)
                else:
                    values = centred(values, self.zero_point, axis)
            values = values.transpose(permutation(step, len(before))) if step.op_type == "Transpose" else values
            values = values.reshape(after)
        return values


def kept_in_groups(values: Array, size: int, axis: int) -> NDArray[np.uint8]:
    """How many values of each aligned group along an axis are not zero; the axis comes first.

    Slices are added up, which needs no copy in another order; the axis must be a multiple of the size.
    """
    kept = np.not_equal(values, 0).view(np.uint8).swapaxes(axis, 0)
    total: NDArray[np.uint8] = kept[::size].copy()
    for offset in range(1, size):
        total += kept[offset::size]
    return total


def rounded(values: Array, scale: Array | None, axis: int | None) -> Array:
    """Integers that a QuantizeLinear with zero-point 0 makes of a float weight; unclipped, so that B7 sees them."""
    wide = spread(scale, axis, values.shape)
    if wide is None:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = values.astype(np.float32) / wide.astype(np.float32)
    return np.clip(np.rint(np.nan_to_num(steps)), LOW - 1, HIGH + 1).astype(np.int16)


def centred(values: Array, point: Array | None, axis: int | None) -> Array:
    """Integers less their zero-point."""
    wide = spread(point, axis, values.shape) if point is not None and np.any(point) else None
    return values if wide is None else values.astype(np.int16) - wide.astype(np.int16)


def spread(values: Array | None, axis: int | None, dims: Dims) -> Array | None:
    """One value, or values per channel in a shape that broadcasts along their axis; None where they do not fit."""
    if values is None or values.size == 1:
        return None if values is None else values.reshape(())
    if axis is None or values.shape != (dims[axis],):
        return None
    return values.reshape([-1 if index == axis else 1 for index in range(len(dims))])


def scale_axis(node: NodeProto | None, scale: Array | None, dims: Dims) -> int | None:
    """Axis of a Q's or DQ's scales; None for one scale, or where they do not fit the shape."""
    if node is None or scale is None or scale.ndim != 1:
        return None
    axis = next((int(entry.i) for entry in node.attribute if entry.name == "axis"), 1)
    axis = axis + len(dims) if axis < 0 else axis
    return axis if axis < len(dims) and dims[axis] == len(scale) else None


def permutation(node: NodeProto, rank: int) -> list[int]:
    """Order of axes of a Transpose."""
    found = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [])
    return found or list(range(rank))[::-1]


def moved_dims(step: NodeProto, dims: Dims, inferred: Sequence[int | str] | None) -> Dims | None:
    """Shape behind a step; None where it is not known."""
    if step.op_type == "Transpose":
        return tuple(dims[axis] for axis in permutation(step, len(dims)))
    if step.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return dims
    known = tuple(size for size in inferred or () if isinstance(size, int))
    return known if math.prod(known) == math.prod(dims) else None


def moved_axis(step: NodeProto, axis: int, before: Dims, after: Dims) -> int | None:
    """Where an axis is behind a step; None where a reshape breaks it up."""
    if step.op_type == "Transpose":
        return permutation(step, len(before)).index(axis)
    ahead = math.prod(before[:axis])
    fits = [i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == ahead]
    return fits[0] if fits else None


def weight_axes(node: NodeProto, rank: int) -> tuple[int, int]:
    """Axes of output channels and of the sum in the weight of a product (rule B5)."""
    transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
    if "Conv" in node.op_type:
        return 0, 1
    return (rank - 2, rank - 1) if transposed else (rank - 1, rank - 2)


LAYERS = {
    "MatMul": Operands(1),
    "Gemm": Operands(1),
    "Conv": Operands(1),
    "MatMulInteger": Operands(1, 3),
    "ConvInteger": Operands(1, 3),
    "QLinearMatMul": Operands(3, 5),
    "QLinearConv": Operands(3, 5),
    "com.microsoft.FusedMatMul": Operands(1),
    "com.microsoft.FusedGemm": Operands(1),
    "com.microsoft.FusedConv": Operands(1),
    "com.microsoft.QGemm": Operands(3, 5),
    "com.microsoft.MatMulIntegerToFloat": Operands(1, 5),
    "com.microsoft.DynamicQuantizeMatMul": Operands(1, 3),
}
