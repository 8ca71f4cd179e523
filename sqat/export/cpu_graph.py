"""The graph of the target `cpu-sparse`: the float graph with embeddings and layers as nodes of the domain `sqat`.

What: `to_cpu_sparse` puts one `Embed` and five nodes a layer (q, k and v as one `Linear`; `Attention`; `Linear` with
residual add and norm; two more `Linear`) in the place of the embeddings and the layers of a traced graph. Pooling and
head stay as they were traced; a quantized linear among them becomes QuantizeLinear and `Linear`.

Why a rewrite of the traced graph and not a trace of its own: what lies around the layers is as many kinds of heads as
there are models, while the layers are of one kind; and all targets share one trace.
Activations between the nodes are uint8 around 128 and never 0 (-127..127): QuantizeLinear would write 0 too, so a
Clip stands before it. Left out: positions or types that a caller gives where the traced graph takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto

from sqat.errors import GateError
from sqat.export.cpu_encoder import Encoder, Norm, Product
from sqat.export.embeddings import quantize_rows
from sqat.export.names import KERNELS, needs_kernels, node_name
from sqat.export.onnx_edit import Array, Rewriting, module
from sqat.quantization.fake_quant import HIGH

VERSION = 1
ZERO_POINT = 128
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
Attributes = Mapping[str, int | float | str]
Size = int | ir.SymbolicDim


def file_needs_kernels(path: Path) -> bool:
    """Whether an ONNX file has nodes of the domain `sqat`; False for what is no ONNX file at all."""
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError):
        return False
    return needs_kernels(model)


class Stream(NamedTuple):
    """A tensor in one of two forms or both: floats (the residual stream) and bytes (what the next linear reads)."""

    floats: ir.Value | None
    bytes: ir.Value | None


def to_cpu_sparse(graph: ModelProto, encoder: Encoder, int8_words: bool = False) -> ModelProto:
    """Rewrite a float graph for the kernels of `sqat.runtime`.

    Args:
        graph: of `sqat.export.graph`, with inputs ``input_ids`` and ``attention_mask``; left as it is.
        encoder: the graph's, calibrated.
        int8_words: store the word embeddings in int8 with a scale for every row.
    """
    rewriting = Rewriting(graph)
    rewriting.graph.opset_imports[KERNELS] = VERSION
    stream = first_stream(rewriting, encoder, int8_words)
    for number in range(len(encoder.layers)):
        stream = add_layer(rewriting, encoder, number, stream)
    last = made(rewriting, f"{encoder.layers[-1]}.{encoder.family.second_norm}", "LayerNormalization").outputs[0]
    assert stream.floats is not None
    last.replace_all_uses_with(stream.floats, replace_graph_outputs=True)
    for name in encoder.quantized.weights:
        if not name.startswith(tuple(f"{layer}." for layer in encoder.layers)):
            replace_outer_linear(rewriting, encoder, name)
    return rewriting.finish()


def first_stream(rewriting: Rewriting, encoder: Encoder, int8_words: bool) -> Stream:
    """Embeddings, and what a family has between them and its first layer (ELECTRA: a linear)."""
    query = f"{encoder.layers[0]}.{encoder.family.query}"
    step = encoder.step(f"{query}:input")
    entering = made(rewriting, query, "MatMul").inputs[0]
    normed = made(rewriting, f"{encoder.base}embeddings.LayerNorm", "LayerNormalization").outputs[0]
    assert entering is not None
    stream = embed(rewriting, encoder, int8_words, step if entering is normed else None)
    assert stream.floats is not None
    normed.replace_all_uses_with(stream.floats)
    return stream if entering is normed else Stream(entering, quantize(rewriting, entering, step, query))


def embed(rewriting: Rewriting, encoder: Encoder, int8_words: bool, step: float | None) -> Stream:
    """The node that adds the embeddings of words, positions and types, and their norm."""
    name, family = f"{encoder.base}embeddings", encoder.family
    ids, types = graph_input(rewriting, "input_ids"), graph_input(rewriting, "token_type_ids")
    word, position = encoder.table(f"{name}.word_embeddings"), encoder.table(f"{name}.position_embeddings")
    type_ = encoder.table(f"{name}.token_type_embeddings") if family.typed else None
    places = made(rewriting, f"{name}.position_embeddings", "Gather").inputs[1] if family.counted else None
    tables = {"word": word, "position": position, "type": type_}
    if int8_words:
        rows, scale = quantize_rows(word)
        tables = {"word": rows, "word_scale": scale[:, 0], "position": position, "type": type_}
    norm = encoder.norm(f"{name}.LayerNorm")
    stored = [*constants(rewriting, name, tables), *norm_constants(rewriting, f"{name}.LayerNorm", norm)]
    return add_stream(
        rewriting,
        "EmbedInt8" if int8_words else "Embed",
        name,
        [ids, types if type_ is not None else None, places, *stored],  # without types, all tokens are of the first
        {"epsilon": norm.epsilon},
        shape=[*shape_of(ids), word.shape[1]],
        floats=True,
        step=step,
    )


def add_layer(rewriting: Rewriting, encoder: Encoder, number: int, stream: Stream) -> Stream:
    """One layer; the last has nobody behind it who reads bytes."""
    layer, family = encoder.layers[number], encoder.family
    following = encoder.layers[number + 1 : number + 2]
    project, widen, narrow = (f"{layer}.{part}" for part in (family.project, family.widen, family.narrow))
    context = attend(rewriting, encoder, layer, stream, encoder.step(f"{project}:input"))
    norms = [encoder.norm(f"{layer}.{norm}") for norm in (family.first_norm, family.second_norm)]
    added = add_linear(rewriting, encoder.product(project), project, context, stream.floats,
                       norm=norms[0], step=encoder.step(f"{widen}:input"))  # fmt: skip
    wide = add_linear(rewriting, encoder.product(widen), widen, added.bytes, floats=False,
                      activation=encoder.activation, step=encoder.step(f"{narrow}:input"))  # fmt: skip
    steps = [encoder.step(f"{name}.{family.query}:input") for name in following]
    return add_linear(rewriting, encoder.product(narrow), narrow, wide.bytes, added.floats,
                      norm=norms[1], step=next(iter(steps), None))  # fmt: skip


def attend(rewriting: Rewriting, encoder: Encoder, layer: str, stream: Stream, step: float) -> ir.Value | None:
    """The nodes of q, k, v and of their two products, in bytes of the step that the next linear reads."""
    family, name = encoder.family, f"{layer}.{encoder.family.attention}"
    parts = [f"{layer}.{part}" for part in (family.query, family.key, family.value)]
    sites = [f"{name}:{role}" for role in ("query", "key", "value")]
    query, key, value = steps = [encoder.step(site) for site in sites]
    fused = encoder.product(*parts)
    width = len(fused.scale) // 3
    qkv = add_linear(rewriting, fused, f"{name}.qkv", stream.bytes, floats=False,
                     step=np.repeat(np.array(steps, np.float32), width)).bytes  # fmt: skip
    assert qkv is not None
    attributes = {
        "heads": encoder.heads,
        "score_scale": query * key * (width // encoder.heads) ** -0.5,
        "value_scale": value,
        "y_scale": step,
    }
    mask = graph_input(rewriting, "attention_mask")
    shape = [*shape_of(qkv)[:-1], width]
    return add_node(rewriting, "Attention", name, [qkv, mask], attributes, shape, {UINT8: True})[0]


def add_linear(
    rewriting: Rewriting,
    product: Product,
    name: str,
    x: ir.Value | None,
    residual: ir.Value | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "none",
    floats: bool = True,
    step: float | Array | None = None,
) -> Stream:
    """A `Linear` node with what follows it.

    Args:
        name: of the module, which its node and weights are named after.
        floats: whether the residual stream goes on from here.
        step: of the bytes it puts out, or the steps of all channels; None for no bytes.
    """
    weight, scale, bias = product
    parts = {"values": weight.values, "positions": weight.positions, "scale": scale, "bias": bias}
    attributes: dict[str, int | float | str] = {"activation": activation}
    steps = {"steps": None if step is None or isinstance(step, float) else step}
    if norm is not None:
        attributes["epsilon"] = norm.epsilon
    return add_stream(
        rewriting,
        "Linear",
        name,
        [
            x,
            *constants(rewriting, name, parts),
            residual,
            *norm_constants(rewriting, f"{name}.norm", norm),
            *constants(rewriting, name, steps),
        ],
        attributes,
        [*shape_of(x)[:-1], len(scale)],
        floats=floats,
        step=step,
    )


def replace_outer_linear(rewriting: Rewriting, encoder: Encoder, name: str) -> None:
    """Put a `Linear` in the place of a float product with its bias, wherever the graph runs it."""
    for node in [node for node in rewriting.graph if module(node) == name and node.op_type in ("MatMul", "Gemm")]:
        x, output = node.inputs[0], node.outputs[0]
        assert x is not None
        followers = [use.node for use in output.uses() if use.node.op_type == "Add" and module(use.node) == name]
        output = followers[0].outputs[0] if followers else output
        bytes_ = quantize(rewriting, x, encoder.step(f"{name}:input"), name)
        floats = add_linear(rewriting, encoder.product(name), name, bytes_).floats
        assert floats is not None
        output.replace_all_uses_with(floats, replace_graph_outputs=True)


def quantize(rewriting: Rewriting, x: ir.Value, step: float, name: str) -> ir.Value:
    """Floats as bytes 1..255."""
    inverse = np.float32(1) / np.float32(step)  # as the kernels and the fake quantizers have it: a quotient may differ
    factor, *ends = constants(
        rewriting, name, {"inverse": inverse, "lowest": np.float32(-HIGH), "largest": np.float32(HIGH)}
    )
    scaled = rewriting.node("Mul", [x, factor], name, dtype=FLOAT, shape=x.shape)
    clipped = rewriting.node("Clip", [scaled, *ends], name, dtype=FLOAT, shape=x.shape)
    steps = constants(rewriting, name, {"step": np.float32(1), "zero_point": np.uint8(ZERO_POINT)})
    return rewriting.node("QuantizeLinear", [clipped, *steps], name, dtype=UINT8, shape=x.shape)


def norm_constants(rewriting: Rewriting, name: str, norm: Norm | None) -> list[ir.Value | None]:
    """Factors and summands of a norm in the graph; two missing inputs where there is none."""
    gamma, beta = (None, None) if norm is None else (norm.gamma, norm.beta)
    return constants(rewriting, name, {"gamma": gamma, "beta": beta})


def constants(
    rewriting: Rewriting, name: str, arrays: Mapping[str, Array | np.generic | None]
) -> list[ir.Value | None]:
    """Initializers named after a module, None for None."""
    return [None if array is None else rewriting.constant(f"{name}.{key}", array) for key, array in arrays.items()]


def add_stream(
    rewriting: Rewriting,
    op: str,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes,
    shape: Sequence[Size],
    *,
    floats: bool,
    step: float | Array | None,
) -> Stream:
    """A node that puts out floats, bytes of a step, or both."""
    steps = {"y_scale": step} if isinstance(step, float) else {}
    wanted = {FLOAT: floats, UINT8: step is not None}
    made_floats, made_bytes = add_node(rewriting, op, name, inputs, {**attributes, **steps}, shape, wanted)
    return Stream(made_floats if floats else None, made_bytes if step is not None else None)


def add_node(
    rewriting: Rewriting,
    op: str,
    name: str,
    inputs: Sequence[ir.Value | None],
    attributes: Attributes,
    shape: Sequence[Size],
    outputs: Mapping[ir.DataType, bool],
) -> list[ir.Value]:
    """A node of the domain `sqat`, named after a module.

    Args:
        shape: of all outputs.
        outputs: type -> whether anybody reads it; else it is left out, which is an empty name.
    """
    free = rewriting.free(node_name(name, op))
    values = [ir.val(f"{free}:{number}" if read else "", dtype, ir.Shape(list(shape)))
              for number, (dtype, read) in enumerate(outputs.items())]  # fmt: skip
    rewriting.graph.append(ir.node(op, inputs, attributes, domain=KERNELS, outputs=values, name=free))
    return values


def made(rewriting: Rewriting, name: str, op: str) -> ir.Node:
    """The first node of an operator that a module runs in the traced graph; GateError where it runs none."""
    found = next((node for node in rewriting.graph if module(node) == name and node.op_type == op), None)
    if found is None:
        raise GateError(f"the traced graph has no {op} of {name}, which target cpu-sparse looks for",
                        "this is a fault of the exporter: please report it with the recipe")  # fmt: skip
    return found


def graph_input(rewriting: Rewriting, name: str) -> ir.Value | None:
    """The graph's input of a name, if it takes it."""
    return next((value for value in rewriting.graph.inputs if value.name == name), None)


def shape_of(value: ir.Value | None) -> list[Size]:
    """Sizes of a tensor, symbolic ones by name."""
    assert value is not None
    assert value.shape is not None
    return list(value.shape)
