"""The constant operand of a product: where it is stored, what it passes, and its values as the product reads them.

Values are the integers that the product multiplies, less the zero-point, so that a pruned weight is 0 whatever its
type; a float weight is itself. Transposes and reshapes are applied: axes are those of the operator (B5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

Array = NDArray[np.generic]
Dims = tuple[int, ...]
T = TypeVar("T")
STEPS = ("Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, *HALF)
LOW, HIGH = -128, 127


class Operands(NamedTuple):
    """Which input of an operator is its weight, and which the weight's zero-point."""

    weight: int
    zero_point: int | None = None

    def zero_point_of(self, node: NodeProto) -> str:
        """Name of a node's zero-point, empty where there is none."""
        index = self.zero_point
        return node.input[index] if index is not None and len(node.input) > index else ""


@dataclass(frozen=True)
class Weight:
    """The constant operand of a product.

    Attributes:
        node: the product.
        name: its initializer.
        stored: value of the initializer, int8 or float.
        steps: nodes between initializer and product, in order of execution.
        dims: shape as stored and behind each step.
        quantizer: the QuantizeLinear behind a weight stored as float (rule B4, form Q -> DQ).
        dequantizer: the DequantizeLinear before the product, None for a float weight.
        scale: of the quantizer, or else the dequantizer; None where it is not constant.
        zero_point: of the same, or of the integer product itself.
        out: axis of the output channels as the product reads the weight.
        reduction: axis of the sum, likewise.
        computed: what was computed from the values; products that read the same tensor share it.
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
    computed: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: object, compute: Callable[[], T]) -> T:
        """Compute something from the values once for all products that read them."""
        if key not in self.computed:
            self.computed[key] = compute()
        result: T = self.computed[key]
        return result

    @property
    def size(self) -> tuple[int, int]:
        """Inputs and outputs of the product (K, N)."""
        return self.dims[-1][self.reduction], self.dims[-1][self.out]

    @property
    def transitions(self) -> list[tuple[NodeProto, Dims, Dims]]:
        """Each step with the shape before and behind it."""
        return list(zip(self.steps, self.dims[:-1], self.dims[1:], strict=True))

    @property
    def axis(self) -> int | None:
        """Axis of the scales in the shape of the dequantized weight; None for one scale or a wrong axis."""
        return scale_axis(self.dequantizer, self.scale, self.dims[self.index_of(self.dequantizer)])

    @property
    def read_axis(self) -> int | None:
        """The axis of the scales as the product reads the weight; None where a reshape splits it."""
        axis = self.axis
        for step, before, after in self.transitions[self.index_of(self.dequantizer) :]:
            axis = axis_after(step, axis, before, after) if axis is not None else None
        return axis

    def index_of(self, node: NodeProto | None) -> int:
        """Index of a step's input shape in ``dims``; 0 for no step."""
        return next((index for index, step in enumerate(self.steps) if step is node), 0)

    @property
    def values(self) -> Array:
        """The weight as the product reads it: integers less the zero-point if it is quantized, else floats."""
        return self.once("values", self.read_values)

    @property
    def zeros(self) -> float:
        """Share of zeros."""
        return self.once("zeros", lambda: float(np.equal(self.values, 0).mean()))

    @property
    def smallest(self) -> float:
        """The smallest value."""
        return self.once("smallest", lambda: float(self.values.min()))

    def count_over(self, limit: int, size: int) -> int:
        """Number of groups of a size along the sum that hold more than some nonzero values."""
        key = ("over", limit, size)
        return self.once(key, lambda: int(np.greater(count_nonzeros(self.values, size, self.reduction), limit).sum()))

    def read_values(self) -> Array:
        """Apply all steps to the stored values."""
        values: Array = numpy_helper.to_array(self.stored)
        source = self.quantizer if self.quantizer is not None else self.dequantizer
        if source is None:
            values = subtract_zero_point(values, self.zero_point, self.out)
        for step, before, after in self.transitions:
            if step is source:
                axis = scale_axis(step, self.scale, before)
                if step is self.quantizer:
                    values = quantize_values(values, self.scale, axis)
                else:
                    values = subtract_zero_point(values, self.zero_point, axis)
            values = values.transpose(permutation(step, len(before))) if step.op_type == "Transpose" else values
            values = values.reshape(after)
        return values


def count_nonzeros(values: Array, size: int, axis: int) -> NDArray[np.uint8]:
    """Count the nonzero values of each aligned group along an axis.

    Args:
        size: of a group; the axis must be a multiple of it.

    Returns:
        Counts, with the axis first.
    """
    nonzero = np.not_equal(values, 0).view(np.uint8).swapaxes(axis, 0)
    total: NDArray[np.uint8] = nonzero[::size].copy()
    for offset in range(1, size):  # adding slices up needs no copy in another order
        total += nonzero[offset::size]
    return total


def quantize_values(values: Array, scale: Array | None, axis: int | None) -> Array:
    """Quantize a float weight with zero-point 0; one step beyond int8 stays, so that B7 sees it."""
    wide = broadcast_along(scale, axis, values.shape)
    if wide is None:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = values.astype(np.float32) / wide.astype(np.float32)
    return np.clip(np.rint(np.nan_to_num(steps)), LOW - 1, HIGH + 1).astype(np.int16)


def subtract_zero_point(values: Array, point: Array | None, axis: int | None) -> Array:
    """Subtract the zero-point from integers."""
    wide = broadcast_along(point, axis, values.shape) if point is not None and np.any(point) else None
    return values if wide is None else values.astype(np.int16) - wide.astype(np.int16)


def broadcast_along(values: Array | None, axis: int | None, dims: Dims) -> Array | None:
    """Shape one value, or values per channel, to broadcast along an axis; None where they do not fit."""
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
    order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [])
    return order or list(range(rank))[::-1]


def shape_after(step: NodeProto, dims: Dims, inferred: Sequence[int | str] | None) -> Dims | None:
    """Shape behind a step; None where it is unknown."""
    if step.op_type == "Transpose":
        return tuple(dims[axis] for axis in permutation(step, len(dims)))
    if step.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return dims
    shape = tuple(size for size in inferred or () if isinstance(size, int))
    return shape if math.prod(shape) == math.prod(dims) else None


def axis_after(step: NodeProto, axis: int, before: Dims, after: Dims) -> int | None:
    """Where an axis is behind a step; None where a reshape splits it."""
    if step.op_type == "Transpose":
        return permutation(step, len(before)).index(axis)
    elements = math.prod(before[:axis])
    axes = [i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == elements]
    return axes[0] if axes else None


def weight_axes(node: NodeProto, rank: int) -> tuple[int, int]:
    """Axes of output channels and of the sum in the weight of a product (rule B5)."""
    transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
    if "Conv" in node.op_type:
        return 0, 1
    return (rank - 2, rank - 1) if transposed else (rank - 1, rank - 2)


OPERANDS = {
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
