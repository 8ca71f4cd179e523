"""The graph of target `cpu-sparse`: the float graph with embeddings and layers as nodes of the domain `sqat`.

An `Embed` and five nodes a layer that skip padding: q, k, v as one `Linear`, `Attention`, `Linear` with residual add
and norm, two more `Linear`. A mean over tokens is one `MeanPool`; other heads stay. Between nodes stand uint8 around
128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from sqat.errors import GateError
from sqat.export.cpu.encoder import Encoder, FusedLinear, Norm
from sqat.export.embeddings import quantize_rows
from sqat.export.names import KERNELS, node_name
from sqat.export.onnx_edit import Array, GraphEditor, module_name
from sqat.quantization.fake_quant import HIGH

VERSION = 1
ZERO_POINT = 128
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
Attributes = Mapping[str, int | float | str]
Size = int | ir.SymbolicDim


class Stream(NamedTuple):
    """A tensor as floats (the residual stream), as bytes (what the next linear reads), or both."""

    floats: ir.Value | None
    bytes: ir.Value | None


def to_cpu_sparse(graph: ModelProto, encoder: Encoder, int8_words: bool = False) -> ModelProto:
    """Rewrite a float graph for the kernels of `sqat.runtime`.

    Args:
        graph: from `sqat.export.graph`, with inputs ``input_ids`` and ``attention_mask``; is not changed.
        encoder: the same model, calibrated.
        int8_words: store word embeddings in int8 with a scale for every row.

    Raises:
        GateError: the graph lacks a node that the encoder has.
    """
    editor = GraphEditor(graph)
    editor.graph.opset_imports[KERNELS] = VERSION
    stream = add_first_stream(editor, encoder, int8_words)
    for number in range(len(encoder.layers)):
        stream = add_layer(editor, encoder, number, stream)
    last = find_node(editor, f"{encoder.layers[-1]}.{encoder.family.second_norm}", "LayerNormalization").outputs[0]
    assert stream.floats is not None
    last.replace_all_uses_with(stream.floats, replace_graph_outputs=True)
    replace_mean_pooling(editor, stream.floats)
    for name in encoder.quantized.weights:
        if not name.startswith(tuple(f"{layer}." for layer in encoder.layers)):
            replace_outer_linear(editor, encoder, name)
    return editor.finish()


def add_first_stream(editor: GraphEditor, encoder: Encoder, int8_words: bool) -> Stream:
    """Add the embeddings; some families (ELECTRA) keep a traced linear between them and the first layer."""
    query = f"{encoder.layers[0]}.{encoder.family.query}"
    step = encoder.step(f"{query}:input")
    layer_input = find_node(editor, query, "MatMul").inputs[0]
    normed = find_node(editor, f"{encoder.base}embeddings.LayerNorm", "LayerNormalization").outputs[0]
    assert layer_input is not None
    stream = add_embed(editor, encoder, int8_words, step if layer_input is normed else None)
    assert stream.floats is not None
    normed.replace_all_uses_with(stream.floats)
    return stream if layer_input is normed else Stream(layer_input, add_quantize(editor, layer_input, step, query))


def add_embed(editor: GraphEditor, encoder: Encoder, int8_words: bool, step: float | None) -> Stream:
    """Add the node that sums the embeddings of words, positions and types, and normalizes the sum."""
    name, family = f"{encoder.base}embeddings", encoder.family
    ids, types = graph_input(editor, "input_ids"), graph_input(editor, "token_type_ids")
    word, position = encoder.table(f"{name}.word_embeddings"), encoder.table(f"{name}.position_embeddings")
    type_ = encoder.table(f"{name}.token_type_embeddings") if family.has_types else None
    positions = (
        find_node(editor, f"{name}.position_embeddings", "Gather").inputs[1] if family.counts_positions else None
    )
    tables = {"word": word, "position": position, "type": type_}
    if int8_words:
        rows, scale = quantize_rows(word)
        tables = {"word": rows, "word_scale": scale[:, 0], "position": position, "type": type_}
    norm = encoder.norm(f"{name}.LayerNorm")
    constants = [*add_constants(editor, name, tables), *add_norm(editor, f"{name}.LayerNorm", norm)]
    return add_stream(
        editor,
        "EmbedInt8" if int8_words else "Embed",
        name,
        [ids, types if type_ is not None else None, positions, *constants],  # without types, all are of the first
        {"epsilon": norm.epsilon},
        shape=[*shape_of(ids), word.shape[1]],
        floats=True,
        step=step,
    )


def add_layer(editor: GraphEditor, encoder: Encoder, number: int, stream: Stream) -> Stream:
    """Add the five nodes of one layer; the last layer puts out no bytes."""
    layer, family = encoder.layers[number], encoder.family
    project, widen, narrow = (f"{layer}.{part}" for part in (family.project, family.widen, family.narrow))
    mask = graph_input(editor, "attention_mask")
    context = add_attention(editor, encoder, layer, stream, encoder.step(f"{project}:input"))
    norms = [encoder.norm(f"{layer}.{norm}") for norm in (family.first_norm, family.second_norm)]
    added = add_linear(editor, encoder.fuse(project), project, context, stream.floats, mask=mask,
                       norm=norms[0], step=encoder.step(f"{widen}:input"))  # fmt: skip
    wide = add_linear(editor, encoder.fuse(widen), widen, added.bytes, mask=mask, floats=False,
                      activation=encoder.activation, step=encoder.step(f"{narrow}:input"))  # fmt: skip
    next_steps = [encoder.step(f"{name}.{family.query}:input") for name in encoder.layers[number + 1 : number + 2]]
    return add_linear(editor, encoder.fuse(narrow), narrow, wide.bytes, added.floats, mask=mask,
                      norm=norms[1], step=next(iter(next_steps), None))  # fmt: skip


def add_attention(editor: GraphEditor, encoder: Encoder, layer: str, stream: Stream, step: float) -> ir.Value | None:
    """Add the nodes of q, k, v and of the two attention products; return bytes of the given step."""
    family, name = encoder.family, f"{layer}.{encoder.family.attention}"
    steps = [encoder.step(f"{name}:{role}") for role in ("query", "key", "value")]
    fused = encoder.fuse(*(f"{layer}.{part}" for part in (family.query, family.key, family.value)))
    width = len(fused.scale) // 3
    mask = graph_input(editor, "attention_mask")
    qkv = add_linear(editor, fused, f"{name}.qkv", stream.bytes, mask=mask, floats=False,
                     step=np.repeat(np.array(steps, np.float32), width)).bytes  # fmt: skip
    query, key, value = steps
    attributes = {
        "heads": encoder.heads,
        "score_scale": query * key * (width // encoder.heads) ** -0.5,
        "value_scale": value,
        "y_scale": step,
    }
    return add_node(editor, "Attention", name, [qkv, mask], attributes, [*shape_of(qkv)[:-1], width], {UINT8: True})[0]


def add_linear(
    editor: GraphEditor,
    linear: FusedLinear,
    name: str,
    x: ir.Value | None,
    residual: ir.Value | None = None,
    *,
    mask: ir.Value | None = None,
    norm: Norm | None = None,
    activation: str = "none",
    floats: bool = True,
    step: float | Array | None = None,
) -> Stream:
    """Add a `Linear` node with what follows it.

    Args:
        name: of the module, after which the node and its weights are named.
        mask: [texts, tokens], 0 for padding, whose rows are left out; None computes all rows.
        floats: put out floats for the residual stream.
        step: of the bytes to put out, or the steps of all channels; None for no bytes.
    """
    weight, scale, bias = linear
    parts = {"values": weight.values, "positions": weight.positions, "scale": scale, "bias": bias}
    steps = {"steps": None if step is None or isinstance(step, float) else step}
    attributes: dict[str, int | float | str] = {"activation": activation}
    if norm is not None:
        attributes["epsilon"] = norm.epsilon
    constants = add_constants(editor, name, parts)
    constants += [residual, *add_norm(editor, f"{name}.norm", norm), *add_constants(editor, name, steps)]
    constants += [] if mask is None else [mask]
    shape = [*shape_of(x)[:-1], len(scale)]
    return add_stream(editor, "Linear", name, [x, *constants], attributes, shape, floats=floats, step=step)


def replace_outer_linear(editor: GraphEditor, encoder: Encoder, name: str) -> None:
    """Replace a float product outside the layers and its bias by a `Linear`, wherever the graph runs it."""
    for node in [node for node in editor.graph if module_name(node) == name and node.op_type in ("MatMul", "Gemm")]:
        x, output = node.inputs[0], node.outputs[0]
        assert x is not None
        adds = [use.node for use in output.uses() if use.node.op_type == "Add" and module_name(use.node) == name]
        output = adds[0].outputs[0] if adds else output
        quantized = add_quantize(editor, x, encoder.step(f"{name}:input"), name)
        floats = add_linear(editor, encoder.fuse(name), name, quantized).floats
        assert floats is not None
        output.replace_all_uses_with(floats, replace_graph_outputs=True)


def replace_mean_pooling(editor: GraphEditor, states: ir.Value) -> None:
    """Replace the mean over the tokens of the last states: ONNX Runtime's own sum depends on the number of threads."""
    mask = graph_input(editor, "attention_mask")
    for product in readers(states, "Mul"):
        weights = next(value for value in product.inputs if value is not states)
        for mean in [mean for total in readers(product, "ReduceSum") for mean in readers(total, "Div")]:
            if is_computed_from(weights, ["Cast", "Unsqueeze"], mask) and is_computed_from(
                mean.inputs[1], ["Clip", "ReduceSum"], weights
            ):
                shape = [size for axis, size in enumerate(shape_of(states)) if axis != 1]
                pooled = add_node(editor, "MeanPool", "pooling", [states, mask], {}, shape, {FLOAT: True})[0]
                mean.outputs[0].replace_all_uses_with(pooled, replace_graph_outputs=True)


def readers(value: ir.Value | ir.Node, op: str) -> list[ir.Node]:
    """List the nodes of an operator that read a value, or the first output of a node."""
    value = value.outputs[0] if isinstance(value, ir.Node) else value
    return [use.node for use in value.uses() if use.node.op_type == op]


def is_computed_from(value: ir.Value | None, ops: Sequence[str], source: ir.Value | None) -> bool:
    """Say whether each of some operators, in any order, made a value from the first input of the next."""
    left = list(ops)
    while left and value is not None and (node := value.producer()) is not None and node.op_type in left:
        left.remove(node.op_type)
        value = node.inputs[0]
    return not left and value is source


def add_quantize(editor: GraphEditor, x: ir.Value, step: float, name: str) -> ir.Value:
    """Quantize floats to bytes 1..255."""
    # As the kernels and the fake quantizers do: times the inverse, and a clip, since QuantizeLinear would write 0 too.
    ends = {"inverse": np.float32(1) / np.float32(step), "lowest": np.float32(-HIGH), "largest": np.float32(HIGH)}
    factor, *limits = add_constants(editor, name, ends)
    scaled = editor.add_node("Mul", [x, factor], name, dtype=FLOAT, shape=x.shape)
    clipped = editor.add_node("Clip", [scaled, *limits], name, dtype=FLOAT, shape=x.shape)
    steps = add_constants(editor, name, {"step": np.float32(1), "zero_point": np.uint8(ZERO_POINT)})
    return editor.add_node("QuantizeLinear", [clipped, *steps], name, dtype=UINT8, shape=x.shape)


def add_norm(editor: GraphEditor, name: str, norm: Norm | None) -> list[ir.Value | None]:
    """Add gamma and beta of a norm; two missing inputs where there is none."""
    gamma, beta = (None, None) if norm is None else (norm.gamma, norm.beta)
    return add_constants(editor, name, {"gamma": gamma, "beta": beta})


def add_constants(
    editor: GraphEditor, name: str, arrays: Mapping[str, Array | np.generic | None]
) -> list[ir.Value | None]:
    """Add initializers named after a module; None stays None."""
    return [None if array is None else editor.add_constant(f"{name}.{key}", array) for key, array in arrays.items()]


def add_stream(
    editor: GraphEditor,
    op: str,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes,
    shape: Sequence[Size],
    *,
    floats: bool,
    step: float | Array | None,
) -> Stream:
    """Add a node that puts out floats, bytes of a step, or both."""
    steps = {"y_scale": step} if isinstance(step, float) else {}
    outputs = {FLOAT: floats, UINT8: step is not None}
    float_output, byte_output = add_node(editor, op, name, inputs, {**attributes, **steps}, shape, outputs)
    return Stream(float_output if floats else None, byte_output if step is not None else None)


def add_node(
    editor: GraphEditor,
    op: str,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes,
    shape: Sequence[Size],
    outputs: Mapping[ir.DataType, bool],
) -> list[ir.Value]:
    """Add a node of the domain `sqat`, named after a module.

    Args:
        shape: of all outputs.
        outputs: type -> whether it has a reader; an output without one gets an empty name.
    """
    free = editor.free_name(node_name(name, op))
    values = [ir.val(f"{free}:{number}" if read else "", dtype, ir.Shape(list(shape)))
              for number, (dtype, read) in enumerate(outputs.items())]  # fmt: skip
    editor.graph.append(ir.node(op, inputs, attributes, domain=KERNELS, outputs=values, name=free))
    return values


def find_node(editor: GraphEditor, name: str, op: str) -> ir.Node:
    """Find the first node of an operator that a module runs.

    Raises:
        GateError: it runs none.
    """
    node = next((node for node in editor.graph if module_name(node) == name and node.op_type == op), None)
    if node is None:
        raise GateError(f"the traced graph has no {op} of {name}, which target cpu-sparse needs",
                        "this is a fault of the exporter: please report it with the recipe",
                        code="unsupported-model")  # fmt: skip
    return node


def graph_input(editor: GraphEditor, name: str) -> ir.Value | None:
    """Get the graph's input of a name; None where there is none."""
    return next((value for value in editor.graph.inputs if value.name == name), None)


def shape_of(value: ir.Value | None) -> list[Size]:
    """List the sizes of a tensor, symbolic ones by name."""
    assert value is not None
    assert value.shape is not None
    return list(value.shape)
