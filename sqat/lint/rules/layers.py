"""B8, B9, B11, O21 and T20: products with a weight: their sizes, inputs, bias and form."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from sqat.lint.findings import Problem
from sqat.lint.graph_view import DEQUANTIZE, LAYOUT, LONGEST_PATH, PRODUCTS, QUANTIZE, SUMS, GraphView, label, op_type
from sqat.lint.rules.attention import node_behind_dequantizer
from sqat.lint.rules.operators import reads_embedding_table
from sqat.lint.rules.weights import is_sparse
from sqat.lint.weight import Weight
from sqat.sparsity.hardware_limits import GOOD_SIDE, SMALLEST_SIDE, SPARSE_INPUTS, SPARSE_OUTPUTS

FLOAT_INPUTS = ("LayerNormalization", "Softmax", "Gelu", "Gather")
INT8_OUTPUT_READERS = ("LayerNormalization", "Gelu")


def check_sizes(view: GraphView) -> Iterator[Problem]:
    """B8: quantized products are wide enough to gain; what must stay float has no DQ before it."""
    for weight in view.quantized_weights:
        if min(weight.size) < SMALLEST_SIDE:
            yield Problem(label(weight.node), f"quantized at {weight.size} [in, out], both must be at least 16")
        elif any(side % GOOD_SIDE for side in weight.size):
            yield Problem(label(weight.node), f"{weight.size} [in, out] are not both multiples of 32", warning=True)
    for node in view.nodes:
        source = view.producer(node.input[0], DEQUANTIZE) if op_type(node) in FLOAT_INPUTS else None
        if source is None or reads_embedding_table(view, source):
            continue
        if not (op_type(node) in INT8_OUTPUT_READERS and is_linear_output(view, source)):  # T16 requires that one
            yield Problem(label(node), f"input of {node.op_type} is quantized")


def is_linear_output(view: GraphView, dequantizer: NodeProto) -> bool:
    """Whether a DQ carries the int8 output of a quantized linear."""
    quantizer = view.producer(dequantizer.input[0], QUANTIZE)
    name = quantizer.input[0] if quantizer is not None else ""
    for _ in range(LONGEST_PATH):
        if (node := view.producer(name, *LAYOUT, *SUMS)) is None:
            break
        name = next((entry for entry in node.input if not view.is_constant(entry)), "")
    product = view.producer(name, *PRODUCTS)
    return product is not None and view.producer(product.input[1], DEQUANTIZE) is not None


def check_sparse_sizes(view: GraphView) -> Iterator[Problem]:
    """B8: sparse products have sizes that sparse kernels take."""
    for weight in view.weights:
        inputs, outputs = weight.size
        if (inputs % SPARSE_INPUTS or outputs % SPARSE_OUTPUTS) and weight.zeros < 1 and is_sparse(weight):
            text = f"sparse at {weight.size} [in, out], which are not multiples of {SPARSE_INPUTS} and {SPARSE_OUTPUTS}"
            yield Problem(label(weight.node), text)


def check_both_operands(view: GraphView) -> Iterator[Problem]:
    """B9: a product has both inputs directly from a DQ, or neither."""
    weights = {id(weight.node): weight for weight in view.weights}
    for node in view.nodes:
        if op_type(node) not in PRODUCTS:
            continue
        weight = weights.get(id(node))
        quantized = [view.producer(name, DEQUANTIZE) is not None for name in node.input[:2]]
        quantized[1] |= weight is not None and weight.dequantizer is not None  # B5 checks what stands between
        if any(quantized) == all(quantized) or (quantized[0] and is_convolution_output(view, node.input[0])):
            continue
        other = node.input[1 if quantized[0] else 0]
        if weight is None and node_behind_dequantizer(view, other) is not None:
            continue  # B12 checks that
        layout = layout_behind_dequantizer(view, other)
        first, second = ("first", "second") if quantized[0] else ("second", "first")
        if layout is not None:
            yield Problem(label(node), f"{layout.op_type} between DequantizeLinear and the {second} input")
        else:
            yield Problem(label(node), f"only the {first} input is quantized")


def is_convolution_output(view: GraphView, name: str) -> bool:
    """Whether a tensor is the int8 output of a quantized convolution, which is no one else's int8 input."""
    quantizer = view.quantizer_before(name)
    product = view.producer(quantizer.input[0], "Conv") if quantizer is not None else None
    weight = view.find_weight(product) if product is not None else None
    return weight is not None and weight.dequantizer is not None


def layout_behind_dequantizer(view: GraphView, name: str) -> NodeProto | None:
    """The change of layout behind which a tensor comes, if a DQ is before it."""
    return view.producer(name, *LAYOUT) if view.producer(view.layout_source(name), DEQUANTIZE) is not None else None


def check_int8_convolutions(view: GraphView) -> Iterator[Problem]:
    """O21: a Q reads a quantized convolution: ONNX Runtime has none with float outputs."""
    for weight in view.quantized_weights:
        name = weight.node.output[0]
        readers = {op_type(reader) for reader in view.consumers.get(name, ())}
        if op_type(weight.node) == "Conv" and (readers != {QUANTIZE} or name in view.outputs):
            yield Problem(label(weight.node), "its output is not quantized, so ONNX Runtime computes it in float")


def check_float_bias(view: GraphView) -> Iterator[Problem]:
    """B11: a bias is float, and its Add directly follows the product; a Conv's is its third input."""
    for node in view.nodes:
        stored = view.constants.get(node.input[0]) if op_type(node) == DEQUANTIZE else None
        if stored is not None and stored.data_type == TensorProto.INT32:
            yield Problem(label(node), "int32 bias")
    for weight in view.quantized_weights:
        if has_direct_bias(view, weight.node):
            continue
        for late in readers_behind_layout(view, weight.node):
            if op_type(late) in SUMS and has_bias_operand(view, late, weight):
                yield Problem(label(late), f"bias is not added directly behind {label(weight.node)}")


def has_direct_bias(view: GraphView, node: NodeProto) -> bool:
    """Whether a product has its bias as a third input, or in an Add right behind it."""
    return any(node.input[2:]) or any(
        op_type(reader) in SUMS and any(name in view.constants for name in reader.input)
        for reader in view.consumers_of(node)
    )


def has_bias_operand(view: GraphView, add: NodeProto, weight: Weight) -> bool:
    """Whether an Add has a constant operand of the layer's width."""
    constants = [view.constants[name] for name in add.input if name in view.constants]
    return any([size for size in tensor.dims if size != 1] == [weight.size[1]] for tensor in constants)


def readers_behind_layout(view: GraphView, node: NodeProto) -> list[NodeProto]:
    """Nodes that read a node's output behind one change of layout or more."""
    pending, seen, result = [node], {id(node)}, []
    while pending and len(seen) < LONGEST_PATH:
        current = pending.pop()
        for reader in view.consumers_of(current):
            if current is not node:
                result.append(reader)
            if op_type(reader) in LAYOUT and id(reader) not in seen:
                seen.add(id(reader))
                pending.append(reader)
    return result


def check_convolutions(view: GraphView) -> Iterator[Problem]:
    """T20: TensorRT 8 has sparse kernels for Conv only."""
    for weight in view.quantized_weights:
        if op_type(weight.node) != "Conv" and is_sparse(weight):
            text = f"sparse {weight.node.op_type}, TensorRT 8 has sparse kernels for Conv only"
            yield Problem(label(weight.node), text)
