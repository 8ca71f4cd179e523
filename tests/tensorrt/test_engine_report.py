"""The report on each layer, from a file and from a log of its build: whole, partial, or of another model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from sqat.errors import GateError, SqatError
from sqat.tensorrt.build_log import (
    BuildLog,
    Choice,
    EngineConstant,
    EngineLayer,
    merge,
    parse_log,
    read_layers,
    read_log,
)
from sqat.tensorrt.report import EngineReport, make_report
from sqat.tensorrt.rows import EngineRow
from sqat.tensorrt.tracing import named_nodes
from tests.tensorrt.encoder import encoder

LOGS = Path(__file__).parent / "logs"
BERT = "bert.encoder.layer"
FASTER = "a dense kernel was faster"


@pytest.fixture(scope="module")
def bert() -> ModelProto:
    return encoder()


def report_of(model: ModelProto, log: BuildLog) -> EngineReport:
    return make_report(Path("model.onnx"), model, log)


def row(report: EngineReport, name: str) -> EngineRow:
    return next(row for row in report.rows if row.name == name)


def test_a_log_of_tensorrt_10(bert: ModelProto) -> None:
    report = report_of(bert, read_log(LOGS / "trtexec-10.log"))
    assert report.summary() == "8 of 12 sparse layers chose a sparse kernel"
    assert (report.log_eligible, report.log_chosen, report.chosen, report.untraced) == (8, 4, 8, ())
    assert len(report.rows) == 14
    for part in ("query", "key", "value"):
        merged = row(report, f"{BERT}.1.attention.self.{part}")
        assert (merged.eligible, merged.chosen, merged.reason) == (True, True, "")
    dense = row(report, f"{BERT}.1.output.dense")
    assert (dense.eligible, dense.chosen, dense.reason) == (True, False, FASTER)
    assert (dense.shape, dense.pattern, dense.int8) == ((32, 64), "2:4", True)
    head = row(report, "classifier")
    assert (head.eligible, head.chosen, head.int8) == (False, False, False)
    assert "3 channels are fewer than 16" in head.reason
    report.require()


def test_layer_information_of_tensorrt_11(bert: ModelProto) -> None:
    report = report_of(bert, read_layers(LOGS / "inspector-11.json"))
    assert report.summary() == "7 of 12 sparse layers chose a sparse kernel"
    chosen = row(report, f"{BERT}.0.attention.self.key")
    assert (chosen.chosen, chosen.weight_type) == (True, "int8")
    assert chosen.kernel.startswith("sm80_xmma_sparse_gemm_i8i8")
    dense = row(report, f"{BERT}.0.output.dense")
    assert (dense.eligible, dense.chosen, dense.reason, dense.weight_type) == (True, False, FASTER, "int8")
    assert row(report, "classifier").chosen is None, "the file does not describe it"


def test_a_log_and_layer_information_agree(bert: ModelProto) -> None:
    log = merge(read_log(LOGS / "trtexec-10.log"), read_layers(LOGS / "inspector-11.json"))
    report = report_of(bert, log)
    assert report.chosen == 8, "one by the log, seven by both"
    assert row(report, f"{BERT}.0.output.dense").chosen is True


def test_counts_without_names_are_shown(bert: ModelProto) -> None:
    log = BuildLog(Choice(8, 5, (), ()))
    report = report_of(bert, log)
    assert report.summary() == "5 of 8 eligible engine layers chose a sparse kernel"
    assert {entry.chosen for entry in report.rows} == {None}
    assert row(report, f"{BERT}.0.output.dense").reason == "the build does not say"
    report.require()


def test_no_sparse_kernel_is_a_missed_gate(bert: ModelProto) -> None:
    report = report_of(bert, read_log(LOGS / "trtexec-10-counts.log"))
    assert report.summary() == "0 of 12 sparse layers chose a sparse kernel"
    with pytest.raises(GateError) as error:
        report.require()
    assert (error.value.code, error.value.hint, error.value.exit_code) == ("dense-layer", FASTER, 3)


def test_the_gate_names_what_is_wrong_with_the_file() -> None:
    model = encoder(int8_out=False)
    report = report_of(model, read_log(LOGS / "trtexec-10-counts.log"))
    query = row(report, f"{BERT}.0.attention.self.query")
    assert query.reason.startswith("breaks T16")
    assert row(report, f"{BERT}.0.intermediate.dense").reason.startswith(f"{FASTER}, perhaps because int8 only behind")
    with pytest.raises(GateError, match="breaks T16") as error:
        report.require()
    assert error.value.code == "dense-layer"


def test_a_layer_that_tensorrt_does_not_list(bert: ModelProto) -> None:
    log = read_log(LOGS / "trtexec-10.log")
    assert log.choice is not None
    eligible = tuple(name for name in log.choice.eligible_names if "layer.1/output" not in name)
    report = report_of(bert, BuildLog(replace(log.choice, eligible=len(eligible), eligible_names=eligible)))
    missing = row(report, f"{BERT}.1.output.dense")
    assert (missing.eligible, missing.chosen) == (False, False)
    assert missing.reason == "TensorRT does not list it, though the file is in order"


def test_a_build_that_describes_nothing_is_no_proof(bert: ModelProto) -> None:
    whole = EngineLayer("{ForeignNode[/bert/Cast.../classifier/Gemm]}", "Myelin", "0x0", ("/classifier/Gemm",), ())
    with pytest.raises(GateError) as error:
        report_of(bert, BuildLog(layers=(whole,))).require()
    assert error.value.code == "dense-layer"


def test_a_sparse_kernel_of_a_whole_part_is_untraced(bert: ModelProto) -> None:
    name = "{ForeignNode[/bert/Cast.../classifier/Gemm]}"
    report = report_of(bert, BuildLog(Choice(1, 1, (name,), (name,))))
    assert (report.chosen, report.untraced) == (0, (name,))
    assert report.summary() == "1 of 1 eligible engine layers chose a sparse kernel"


@pytest.mark.parametrize(
    "read", [lambda: read_log(LOGS / "trtexec-8.log"), lambda: read_layers(LOGS / "inspector-8.json")]
)
def test_a_log_of_another_model_is_refused(bert: ModelProto, read) -> None:
    with pytest.raises(SqatError) as error:
        report_of(bert, read())
    assert (error.value.code, error.value.place) == ("model-mismatch", "model.onnx")


CONVOLUTIONS = """<ir_version: 9, opset_import: ["" : 17]>
head (float[N, 32, 1, 1] x) => (float[N, 16] y)
<float s = {0.1}, int8 z = {0}, float[64] s2 = {}, int8[64] z2 = {}, float[32] s7 = {}, int8[32] z7 = {},
 float[16] s11 = {}, int8[16] z11 = {}, int64[2] rows = {-1, 32}> {
    q0 = QuantizeLinear(x, s, z)
    d0 = DequantizeLinear(q0, s, z)
    qw2 = QuantizeLinear<axis = 0>(w2, s2, z2)
    dw2 = DequantizeLinear<axis = 0>(qw2, s2, z2)
    c2 = Conv(d0, dw2)
    r4 = Relu(c2)
    q5 = QuantizeLinear(r4, s, z)
    d5 = DequantizeLinear(q5, s, z)
    qw7 = QuantizeLinear<axis = 0>(w7, s7, z7)
    dw7 = DequantizeLinear<axis = 0>(qw7, s7, z7)
    c7 = Conv(d5, dw7)
    q8 = QuantizeLinear(c7, s, z)
    d8 = DequantizeLinear(q8, s, z)
    flat = Reshape(d8, rows)
    q9 = QuantizeLinear(flat, s, z)
    d9 = DequantizeLinear(q9, s, z)
    qw11 = QuantizeLinear<axis = 1>(w11, s11, z11)
    dw11 = DequantizeLinear<axis = 1>(qw11, s11, z11)
    m11 = MatMul(d9, dw11)
    q12 = QuantizeLinear(m11, s, z)
    y = DequantizeLinear(q12, s, z)
}"""
NAMES = {"c2": "Conv_2", "r4": "Relu_4", "c7": "Conv_7", "m11": "MatMul_11"}


@pytest.fixture(scope="module")
def convolutions() -> ModelProto:
    """Two convolutions and a MatMul, 2:4 all three, in the form for TensorRT 8."""
    model = onnx.parser.parse_model(re.sub(r"(float|int8)\[(\d+)\] (\w+) = \{\}", fill, CONVOLUTIONS))
    for node in model.graph.node:
        node.name = NAMES.get(node.output[0], node.output[0])
    generator = np.random.default_rng(0)
    for name, shape, axis in (("w2", (64, 32, 1, 1), 1), ("w7", (32, 64, 1, 1), 1), ("w11", (32, 16), 0)):
        weight = generator.integers(1, 100, shape).astype(np.float32) / 10
        np.moveaxis(weight, axis, 0)[::2] = 0
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return model


def fill(match: re.Match[str]) -> str:
    value = "0.1" if match[1] == "float" else "0"
    return f"{match[1]}[{match[2]}] {match[3]} = {{{', '.join([value] * int(match[2]))}}}"


def test_a_log_of_tensorrt_8(convolutions: ModelProto) -> None:
    report = report_of(convolutions, read_log(LOGS / "trtexec-8.log"))
    assert report.summary() == "1 of 3 sparse layers chose a sparse kernel"
    first, second, third = report.rows
    assert (first.node, first.eligible, first.chosen, first.reason) == ("Conv_2", True, True, "")
    assert (second.node, second.eligible, second.chosen) == ("Conv_7", True, False)
    assert second.reason.startswith(FASTER)
    assert (third.node, third.eligible, third.chosen) == ("MatMul_11", True, False)
    assert "T20" in third.reason


def test_layer_information_of_tensorrt_8(convolutions: ModelProto) -> None:
    first, second, third = report_of(convolutions, read_layers(LOGS / "inspector-8.json")).rows
    assert (first.chosen, first.weight_type) == (True, "int8")
    assert (second.chosen, second.eligible) == (False, True)
    assert third.chosen is None


def report_without_kernels(model: ModelProto, kind: str, size: int | None) -> EngineReport:
    """A report on a build that leaves kernels to the GPU and keeps each weight as ``kind``."""
    nodes = [entry.node for entry in report_of(model, BuildLog()).rows]
    layers = [
        EngineLayer(f"{node}_myl0_1", "gemm", "__myelin_CASK_STUB", (node,), (EngineConstant(kind, 10**6),))
        for node in nodes
    ]
    return report_of(model, BuildLog(layers=tuple(layers), weight_bytes=size))


def test_kernels_chosen_on_the_gpu_are_no_failure(bert: ModelProto) -> None:
    report = report_without_kernels(bert, "int8", 25_400)
    assert report.chosen_later
    assert {entry.chosen for entry in report.rows} == {None}
    assert report.summary().startswith("12 of 12 sparse layers are eligible for a sparse kernel; TensorRT-RTX chooses")
    assert report.weights() == (
        f"weights: 25.4 kB in the engine, {report.file_bytes / 1e3:.1f} kB in the file; "
        "12 of 12 int8 layers kept int8 weights"
    )
    report.require()


def test_a_library_that_names_itself_needs_no_stub(bert: ModelProto) -> None:
    text = "[I] [TRT] tensorrt_rtx 1.7.1.116, sparse weights allowed\n[I] [TRT] Total Weights Memory: 25400 bytes\n"
    assert report_of(bert, parse_log(text)).chosen_later
    assert not report_of(bert, parse_log(text.replace("_rtx", ""))).chosen_later
    assert not report_of(bert, parse_log("[I] Engine: /models/tensorrt-rtx/a.engine")).chosen_later


def test_expanded_weights_are_a_missed_gate(bert: ModelProto) -> None:
    with pytest.raises(GateError, match=r"12 int8 layers as fp32") as error:
        report_without_kernels(bert, "fp32", 25_400).require()
    assert error.value.code == "broken-rule"


def test_bytes_show_expanded_weights_that_no_layer_shows(bert: ModelProto) -> None:
    stub = EngineLayer("/classifier/Gemm_myl0_9", "gemm", "__myelin_CASK_STUB", ("/classifier/Gemm",), ())
    report = report_of(bert, BuildLog(layers=(stub,), weight_bytes=26_000))
    report.require()
    int8 = sum(entry.shape[0] * entry.shape[1] for entry in report.rows if entry.int8)
    with pytest.raises(GateError) as error:
        replace(report, engine_bytes=report.file_bytes + int8).require()
    assert error.value.code == "broken-rule"


def test_a_file_without_sparse_layers_can_have_no_sparse_engine() -> None:
    dense = encoder()
    for tensor in dense.graph.initializer:
        if tensor.name.endswith("weight_int8"):
            tensor.CopyFrom(numpy_helper.from_array(np.ones(tensor.dims, np.int8), tensor.name))
    with pytest.raises(GateError) as error:
        report_without_kernels(dense, "int8", None).require()
    assert error.value.code == "dense-layer"


def test_json_holds_the_report(bert: ModelProto) -> None:
    report = report_of(bert, read_log(LOGS / "trtexec-10.log"))
    content = json.loads(json.dumps(report.as_json()))
    assert (content["chosen"], content["log_chosen"], len(content["rows"])) == (8, 4, 14)
    assert content["rows"][0]["name"] == f"{BERT}.0.attention.self.query"


KNOWN = {"/a/layer.0/q/MatMul", "/a/layer.0/k/MatMul", "/c/Gemm", "Conv_2", "Conv_20", "MatMul_1"}


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("Conv_2 + Relu_4", {"Conv_2"}),
        ("Conv_20", {"Conv_20"}),
        ("weight + QuantizeLinear_3 + Conv_2 + PWN(Relu_4, Mul_5)", {"Conv_2"}),
        ("/a/layer.0/q/MatMul+/a/layer.0/k/MatMul_myl0_12", {"/a/layer.0/q/MatMul", "/a/layer.0/k/MatMul"}),
        ("/c/Gemm_194", {"/c/Gemm"}),
        ("/c/Gemm_194_myl3_7", {"/c/Gemm"}),
        ("MatMul_11", set()),
        ("{ForeignNode[/a/layer.0/q/MatMul.../c/Gemm]}", set()),
        ("__myl_FcAddTanh_myl0_26", set()),
        ("", set()),
    ],
)
def test_names_of_fused_layers(name: str, nodes: set[str]) -> None:
    assert named_nodes(name, KNOWN) == nodes


def float_convolutions(count: int) -> ModelProto:
    """Convolutions with float 2:4 weights."""
    nodes = " ".join(f"c{i} = Conv({f'c{i - 1}' if i else 'x'}, w{i})" for i in range(count))
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n, 32, 4, 4] x) => (float[n, 32, 4, 4] y)'
        f" {{ {nodes} y = Relu(c{count - 1}) }}"
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"Conv_{index}"
    weight = np.ones((32, 32, 1, 1), np.float32)
    weight[:, ::2] = 0
    model.graph.initializer.extend(numpy_helper.from_array(weight, f"w{i}") for i in range(count))
    return model


@pytest.mark.parametrize("version_8", [True, False])
def test_an_eligible_float_layer_is_dense_since_that_was_faster(version_8: bool) -> None:
    """What the chosen layers lack as well is no reason."""
    names = tuple(f"Conv_{index}" for index in range(4))
    log = BuildLog(Choice(4, 2, names, names[:2], version_8))
    rows = report_of(float_convolutions(5), log).rows
    assert [(row.eligible, row.chosen) for row in rows] == [(True, True)] * 2 + [(True, False)] * 2 + [(False, False)]
    assert [row.reason for row in rows[:4]] == ["", "", f"eligible; {FASTER}", f"eligible; {FASTER}"]
    assert "no DequantizeLinear" in rows[4].reason


def test_a_flag_of_the_layer_information_makes_it_eligible() -> None:
    layers = tuple(
        EngineLayer(f"Conv_{index}", "CaskConvolution", "sm80_dense", (f"Conv_{index}",), (), eligible=index == 0)
        for index in range(2)
    )
    first, second = report_of(float_convolutions(2), BuildLog(layers=layers)).rows
    assert (first.eligible, first.chosen, first.reason) == (True, False, f"eligible; {FASTER}")
    assert "no DequantizeLinear" in second.reason


def test_several_builds_are_said(bert: ModelProto) -> None:
    text = (LOGS / "trtexec-10.log").read_text() + "\nEngine built in 3 sec.\n"
    assert report_of(bert, parse_log(text)).notes == ()
    report = report_of(bert, parse_log(text * 2))
    assert report.notes == ("the log holds 2 builds, this is the last",)
    assert report.chosen == 8
