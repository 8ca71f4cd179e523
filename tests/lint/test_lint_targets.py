"""The linter on files that sqat exports for each target: all families, convolutions, float16; and its verdicts.

Every family passes its target; each other graph breaks one rule.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graph_edits import (
    ALL,
    ENCODER,
    LAYER,
    QUERY,
    RESIDUAL,
    SELF,
    change,
    findings_of,
    messages,
    node,
    parsed,
    put,
    quantized_weight,
    sparse,
    tied,
    verdicts,
)
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sqat.errors import SqatError
from sqat.export.conv1x1 import to_conv1x1
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.opset17 import to_opset17
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.layer_report import lint
from tests.onnx_models import FAMILIES, Family, ImageFamily, build_family

# The families, as they are exported here


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "bert"])
def test_a_family_with_all_sites_passes_tensorrt(name: str) -> None:
    assert_passes(build_family(name))


def test_an_image_model_passes_tensorrt(vit: ImageFamily) -> None:
    assert_passes(vit)


def assert_passes(family: Family) -> None:
    model = insert_qdq(family.graph, family.quantization(*family.roles(*ALL)))
    assert {f.requirement for f in findings_of(model, "tensorrt")} <= {"one output scale for q, k and v"}
    assert findings_of(insert_qdq(family.graph, family.quantization()), "onnx-int8") == []
    result = lint(fold_attention_scale(model), "tensorrt")
    assert result.running == len(family.weights)
    assert result.errors == []


def test_outputs_quantized_where_the_attention_reads_them_are_int8_out(bert: Family) -> None:
    """The placement tensorrt: q, k and v have their Q at the product, before an activation function there is none."""
    quantization = bert.quantization(*ALL)
    covered = ("query:output", "key:output", "value:output", "intermediate.dense:output")
    amax = {site: value for site, value in quantization.amax.items() if not site.endswith(covered)}
    for layer in (0, 1):
        sites = [f"bert.encoder.layer.{layer}.attention.self:{part}" for part in ("query", "key", "value")]
        amax |= dict.fromkeys(sites, max(amax[site] for site in sites))
    result = lint(insert_qdq(bert.graph, QuantizedModel(quantization.weights, amax)), "tensorrt")
    assert {(f.rule, f.problem, f.warning) for f in result.findings} == {("T16", "int8 only behind Gelu", True)}
    assert (result.running, result.doubtful) == (10, 2)


# Convolutions and TensorRT 8


@pytest.fixture(scope="module")
def convolutions(bert: Family) -> bytes:
    model = to_opset17(to_conv1x1(insert_qdq(bert.graph, tied(bert, *ALL), "qdq")))
    return bytes(model.SerializeToString())


def test_convolutions_pass_tensorrt_8(convolutions: bytes, bert: Family) -> None:
    result = lint(onnx.load_from_string(convolutions), "tensorrt-8")
    assert (result.findings, result.running) == ([], len(bert.weights))
    assert {layer.shape for layer in result.layers} == {(32, 32), (64, 32), (32, 64), (3, 32)}


def conv_axis(model: ModelProto) -> str:
    for op in ("QuantizeLinear", "DequantizeLinear"):
        node(model, f"{SELF}/query/weight/{op}").attribute[0].i = 1
    return f"B5 {SELF}/query/Conv: weight scales along axis 1, output channels are axis 0"


def conv_bias(model: ModelProto) -> str:
    conv = node(model, f"{ENCODER}/output/dense/Conv")
    bias = conv.input.pop()
    pair = node(model, f"{ENCODER}/output/dense/output/QuantizeLinear")
    put(model, "last", numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == bias)))
    extra = [
        helper.make_node("Squeeze", [conv.output[0], "last_axis"], ["squeezed"], name="/Squeeze_extra"),
        helper.make_node("Transpose", ["squeezed"], ["turned"], name="/Transpose_extra", perm=[0, 2, 1]),
        helper.make_node("Add", ["turned", "last"], ["biased"], name="/Add_extra"),
    ]
    put(model, "last_axis", np.array([3], np.int64))
    place = list(model.graph.node).index(pair)
    for entry in reversed(extra):
        model.graph.node.insert(place, entry)
    return f"B11 /Add_extra: bias is not added directly behind {ENCODER}/output/dense/Conv"


def conv_values(model: ModelProto) -> str:
    name = node(model, f"{SELF}/query/weight/QuantizeLinear").input[0]
    change(model, name, lambda value: value.__setitem__((5, slice(0, 4)), 1.0))
    return f"B6 {SELF}/query/Conv: almost 2:4: 51% zeros, but 1 of 256 groups hold more than 2 of 4 weights"


def conv_input(model: ModelProto) -> str:
    conv = node(model, f"{SELF}/query/Conv")
    conv.input[0] = node(model, f"{SELF}/query/input/QuantizeLinear").input[0]
    return f"B9 {SELF}/query/Conv: only the second input is quantized"


@pytest.mark.parametrize("edit", [conv_axis, conv_bias, conv_values, conv_input])
def test_a_broken_convolution(convolutions: bytes, edit: Callable[[ModelProto], str]) -> None:
    model = onnx.load_from_string(convolutions)
    line = edit(model)
    assert line in [str(finding) for finding in findings_of(model, "tensorrt-8")]


def test_tensorrt_8_reads_opset_17_at_most(bert: Family) -> None:
    model = to_conv1x1(insert_qdq(bert.graph, tied(bert, *ALL), "qdq"))
    assert messages(model, "tensorrt-8", "B1") == ["B1: opset 20, must be 13 to 17"]
    assert messages(model, "tensorrt", "B1") == []
    assert messages(to_opset17(model), "tensorrt", "B1") == ["B1: opset 17, must be 18 to 20"]


def test_tensorrt_8_requires_convolutions_and_float_weights(bert: Family) -> None:
    model = insert_qdq(bert.graph, tied(bert, *ALL))
    assert f"T20 {SELF}/query/MatMul: sparse MatMul, TensorRT 8 has sparse kernels for Conv only" in messages(
        model, "tensorrt-8", "T20"
    )
    assert len(messages(model, "tensorrt-8", "T20")) == len(messages(model, "tensorrt-8", "B4")) == len(bert.weights)
    result = lint(model, "tensorrt-8")
    assert (result.running, result.layers[0].runs) == (0, "float")
    assert lint(insert_qdq(bert.graph, tied(bert, *ALL), "qdq"), "tensorrt-8").layers[0].runs == "dense int8"


# Float16 and float32


@pytest.fixture(scope="module")
def halved(bert: Family) -> bytes:
    return bytes(to_float16(fold_attention_scale(insert_qdq(bert.graph, tied(bert, *ALL)))).SerializeToString())


def test_float16_graphs_pass(halved: bytes, bert: Family) -> None:
    assert lint(onnx.load_from_string(halved), "tensorrt").findings == []
    result = lint(to_float16(bert.graph), "onnx-fp16")
    assert (result.findings, result.running) == ([], len(bert.weights))
    dense = "not 2:4 along its inputs"
    reasons = {"", f"3 channels are fewer than 16; {dense}", f"its weight has no DequantizeLinear; {dense}"}
    assert {layer.reason for layer in result.layers} == reasons


HALF = """agraph (float16[batch, 64] x) => (float16[batch, 64] y)
<int8 z = {0}> {
    mask = Cast<to = 10>(mask_value)
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = 1>(w, ws, wz)
    p = MatMul(d, wd)
    b = Add(p, bias)
    y = Add(b, mask)
}"""


def half_graph(**others: np.ndarray | np.generic) -> ModelProto:
    values = {
        "w": sparse(64, 64), "ws": np.ones(64, np.float16), "wz": np.zeros(64, np.int8), "s": np.float16(0.0625),
        "bias": np.ones(64, np.float16), "mask_value": np.float32(-1e4), **others,
    }  # fmt: skip
    return parsed(HALF, **{name: np.asarray(value) for name, value in values.items()})


TYPES: list[tuple[ModelProto, list[str]]] = [
    (half_graph(), []),
    (
        half_graph(s=np.float32(0.0625)),
        [
            "q: scale is float, its input is float16",
            "d: scale is float, MatMul behind it reads float16",
            "wd: scale is float16, MatMul behind it reads float",
            *(f"{node}: {op} reads float and float16" for node, op in (("p", "MatMul"), ("b", "Add"), ("y", "Add"))),
        ],
    ),
    (
        half_graph(ws=np.ones(64, np.float32)),
        [
            "d: scale is float16, MatMul behind it reads float",
            "wd: scale is float, MatMul behind it reads float16",
            "p: MatMul reads float and float16",
        ],
    ),
    (half_graph(ws=np.full(64, 6e-5, np.float16)), ["wd: float16 scale 6e-05, must be at least 6.2e-05"]),
    (half_graph(bias=np.ones(64, np.float32)), ["b: Add reads float and float16"]),
    (half_graph(bias=np.full(64, -np.inf, np.float16)), ["bias: holds values that are not finite"]),
    (half_graph(mask_value=np.float32(-3.4e38)), ["mask_value: holds 3.4e+38, which float16 cannot"]),
]


@pytest.mark.parametrize(("model", "problems"), TYPES, ids=range(len(TYPES)))
def test_types_that_strong_typing_refuses(model: ModelProto, problems: list[str]) -> None:
    assert messages(model, "tensorrt", "T18") == [f"T18 {line}" for line in problems]
    assert messages(model, "onnx-int8", "T18") == []


def test_bfloat16_weights_are_float_weights() -> None:
    text = "agraph (bfloat16[batch, 64] x) => (bfloat16[batch, 64] y) { y = MatMul(x, w) }"
    model = parsed(text)
    values = sparse(64, 64).astype(np.float32)
    values[0, 0] = -0.0
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, (64, 64), values.flatten()))
    (layer,) = lint(model, "onnx-fp16").layers
    assert (layer.pattern, layer.runs) == ("2:4", "float")
    assert messages(model, "onnx-fp16", "B7") == ["B7 y: 1 weights are -0.0"]


def test_a_float_target_forbids_quantizers(bert: Family) -> None:
    model = insert_qdq(bert.graph, bert.quantization())
    assert "float: QuantizeLinear in a float file" in {
        f"{f.rule}: {f.problem}" for f in findings_of(model, "onnx-fp32")
    }
    negative = onnx.load_from_string(bert.graph.SerializeToString())
    change(negative, "classifier.weight", lambda value: value.__setitem__((0, 0), -0.0))
    for target in ("onnx-fp32", "onnx-fp16"):
        assert messages(negative, target, "B7") == ["B7 /classifier/Gemm: 1 weights are -0.0"]


def test_a_float16_file_must_hold_float16(bert: Family) -> None:
    (finding,) = lint(bert.graph, "onnx-fp16").findings
    assert (finding.rule, finding.problem, finding.warning) == (
        "layers", "holds no float16 weight, so no layer runs in float16", False,
    )  # fmt: skip


# Verdicts


def test_why_layers_do_not_run_sparse(bert: Family) -> None:
    model = insert_qdq(bert.graph, bert.quantization())
    runs = verdicts(model)
    assert runs["classifier"] == ("float", "3 channels are fewer than 16; not 2:4 along its inputs")
    assert runs["bert.pooler.dense"][0] == "float"
    assert runs[QUERY][0] == "dense int8"
    assert runs[QUERY][1].startswith("breaks T16 (int8 out")
    assert runs[f"{LAYER}.intermediate.dense"] == ("sparse int8?", "int8 only behind Gelu")
    assert verdicts(model, "onnx-int8")[QUERY] == ("sparse int8", "")


def test_a_broken_pair_takes_its_layer_out_of_int8(bert: Family) -> None:
    model = insert_qdq(bert.graph, tied(bert, *ALL))
    put(model, f"{QUERY}:input_scale", np.float32(-1))
    runs = verdicts(model)
    assert runs[QUERY] == ("float", "breaks B3 (constant, finite and positive scales)")
    assert {name for name, verdict in runs.items() if verdict[0] != "sparse int8"} == {
        QUERY,
        "bert.pooler.dense",
        "classifier",
    }


def test_an_invalid_file_runs_nothing(bert: Family) -> None:
    model = insert_qdq(bert.graph, bert.quantization())
    node(model, f"{SELF}/query/MatMul").input[0] = "nowhere"
    assert {layer.runs for layer in lint(model, "tensorrt").layers} == {"refused"}


def test_a_file_without_quantized_or_without_sparse_layers(bert: Family) -> None:
    (finding,) = lint(bert.graph, "tensorrt").findings
    assert str(finding) == "layers: holds no quantized layer, so none will run in int8"
    dense = parsed(RESIDUAL % "[64]", **{**quantized_weight(), "w": np.ones((64, 64), np.int8)})
    assert str(lint(dense, "tensorrt").findings[-1]) == "layers: no layer will run sparse"
    assert lint(dense, "tensorrt").findings[-1].warning
    assert lint(dense, "onnx-int8").findings == []


def test_a_file_without_layers(bert: Family) -> None:
    model = parsed("agraph (float[batch, 64] x) => (float[batch, 64] y) { y = Relu(x) }")
    with pytest.raises(SqatError) as error:
        lint(model, "tensorrt", "a place")
    assert (error.value.code, error.value.place) == ("no-layer", "a place")
