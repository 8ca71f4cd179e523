"""The Q/DQ writer against a fake-quantized torch model: same sites, same numbers, and int8 all the way through."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper, parser
from torch import nn

from sqat.errors import SqatError
from sqat.export.graph import export_float
from sqat.export.names import module_of
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings, verify
from sqat.runtime.sessions import find_float_products, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import ATTENTION, Family, ImageFamily

PLACEMENTS = {
    "linear": (),
    "outputs": ("output",),
    "attention": ATTENTION,
    "residual": ("add",),
    "tensorrt": ("output", *ATTENTION, "add"),
}
BATCHES = [(1, 2, "right"), (3, 9, "right"), (4, 20, "left"), (2, 33, "right"), (8, 16, "left")]
ROUNDING = 5e-6  # logits are about 1; a value that falls on the other side of one rounding step moves them by 1e-3
QUERY = "bert.encoder.layer.0.attention.self.query"


def run(model: ModelProto, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    return run_batches(session(model.SerializeToString(), threads=1), [{k: v.numpy() for k, v in inputs.items()}])


def tensor(model: ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(entry) for entry in model.graph.initializer if entry.name == name)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_onnx_runtime_computes_what_the_fake_quantized_model_does(family: Family, placement: str) -> None:
    quantization = family.quantization(*family.roles(*PLACEMENTS[placement]))
    model = insert_qdq(family.graph, quantization)
    assert [finding.rule for finding in verify(model, dict.fromkeys(family.weights, "2:4"))] == []
    runtime = session(model.SerializeToString(), threads=1)
    for batch, sequence, side in BATCHES:
        inputs = family.inputs(batch, sequence, side, seed=7)
        expected = family.reference(quantization, inputs).numpy()
        assert parity(expected, run_batches(runtime, [{k: v.numpy() for k, v in inputs.items()}])) < ROUNDING


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_images_compute_the_same(vit: ImageFamily, placement: str) -> None:
    quantization = vit.quantization(*PLACEMENTS[placement])
    model = insert_qdq(vit.graph, quantization)
    broken = [
        finding.rule for finding in list_findings(model, dict.fromkeys(vit.weights, "2:4")) if not finding.warning
    ]
    assert set(broken) <= {"B12", "B14"}  # an image's size is fixed; outputs alone leave a Transpose behind a DQ
    pairs = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    wanted = sum(node.op_type == "MatMul" and set(node.input) <= pairs for node in model.graph.node)
    optimized = optimized_graph(model.SerializeToString())
    counts = count_operators(optimized)
    assert wanted == len(vit.weights) + (4 if "query" in PLACEMENTS[placement] else 0)
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] >= wanted
    assert find_float_products(optimized) == []
    assert counts["Conv"] == 1  # the patches' embedding stays float
    runtime = session(model.SerializeToString(), threads=1)
    for batch in (1, 2, 3, 5, 8):
        inputs = vit.inputs(batch, seed=7)
        expected = vit.reference(quantization, inputs).numpy()
        assert parity(expected, run_batches(runtime, [{k: v.numpy() for k, v in inputs.items()}])) < ROUNDING


@pytest.mark.parametrize("role", [*ATTENTION, "output", "add0.left", "add0.right", "input"])
def test_parity_notices_each_kind_of_site(bert: Family, role: str) -> None:
    """The test above can fail: without the sites of one role the reference is far from the file."""
    complete = bert.quantization(role)
    fewer = {site: amax for site, amax in complete.amax.items() if not site.endswith(f":{role}")}
    inputs = bert.inputs(4, 12, seed=3)
    reference = bert.reference(QuantizedModel(complete.weights, fewer), inputs).numpy()
    assert len(fewer) < len(complete.amax)
    assert parity(reference, run(insert_qdq(bert.graph, complete), inputs)) > 100 * ROUNDING


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_every_quantized_product_runs_in_int8(family: Family, placement: str) -> None:
    model = insert_qdq(family.graph, family.quantization(*family.roles(*PLACEMENTS[placement])))
    optimized = optimized_graph(model.SerializeToString())
    pairs = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    wanted = sum(node.op_type == "MatMul" and set(node.input) <= pairs for node in model.graph.node)
    counts = count_operators(optimized)
    assert wanted >= len(family.weights)
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] >= wanted  # more where it moves a DQ down
    assert find_float_products(optimized) == []


def test_equal_pairs_with_a_common_zero_point_would_stay_in_float(bert: Family) -> None:
    """Why each pair has its own: q, k and v read one tensor with one scale."""
    model = insert_qdq(bert.graph, bert.quantization())
    for node in model.graph.node:
        if (
            node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and "/self/" in node.name
            and "weight" not in node.name
        ):
            node.input[2] = f"{QUERY}:input_zero_point"
    named = {module_of(node) for name in find_float_products(optimized_graph(model.SerializeToString()))
             for node in model.graph.node if node.name == name}  # fmt: skip
    assert {f"bert.encoder.layer.0.attention.self.{role}" for role in ("query", "key", "value")} <= named


def test_int8_weights_keep_the_mask_and_the_layout(bert: Family) -> None:
    model = insert_qdq(bert.graph, bert.quantization())
    stored = tensor(model, f"{QUERY}.weight_int8")
    expected, scale = bert.weights[QUERY]
    assert stored.dtype == np.int8
    assert np.array_equal(stored, expected.t().numpy())
    assert np.array_equal(tensor(model, f"{QUERY}.weight_scale"), scale.numpy())
    assert (tensor(model, f"{QUERY}.weight_scale") > 0).all()
    assert not stored[:, 3].any()
    names = {entry.name for entry in model.graph.initializer}
    assert f"{QUERY}.weight" not in names
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= names


@pytest.mark.parametrize("placement", ["linear", "tensorrt"])
def test_float_weights_behind_a_q_compute_the_same(family: Family, placement: str) -> None:
    quantization = family.quantization(*family.roles(*PLACEMENTS[placement]))
    int8, floats = (insert_qdq(family.graph, quantization, form) for form in ("dq", "qdq"))
    assert [finding.rule for finding in verify(floats, dict.fromkeys(family.weights, "2:4"))] == []
    for batch, sequence, side in BATCHES:
        inputs = family.inputs(batch, sequence, side, seed=7)
        assert parity(run(int8, inputs), run(floats, inputs)) == 0
    graphs = [optimized_graph(model.SerializeToString()) for model in (int8, floats)]
    assert count_operators(graphs[0]) == count_operators(graphs[1])
    assert find_float_products(graphs[1]) == []


LINEAR = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, IN] x) => (float[batch, OUT] logits) <float[SHAPE] w> { logits = PRODUCT(x, w) }"""


@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=5), st.booleans())
def test_a_q_gives_every_int8_weight_back(scales: list[float], transposed: bool) -> None:
    """All of -127..127, at any scale down to a dead row's, in both layouts."""
    outputs = len(scales) + 1
    shape = f"{outputs}, 255" if transposed else f"255, {outputs}"
    text = LINEAR.replace("IN", "255").replace("OUT", str(outputs)).replace("SHAPE", shape)
    model = parser.parse_model(text.replace("PRODUCT", "Gemm<transB = 1>" if transposed else "MatMul"))
    model.graph.node[0].name = "/layer/Product"
    zeros = np.zeros((outputs, 255) if transposed else (255, outputs), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(zeros, "w"))
    integers = torch.arange(-127, 128, dtype=torch.int8).repeat(outputs, 1)
    integers[-1] = 0
    scale = torch.tensor([*scales, 2.0**-40 / 127], dtype=torch.float32)
    written = insert_qdq(model, QuantizedModel({"layer": (integers, scale)}, {"layer:input": 1.0}), "qdq")
    quantizer = next(node for node in written.graph.node if node.name == "/layer/weight/QuantizeLinear")
    floats, divisor = (tensor(written, name) for name in quantizer.input[:2])
    axis = quantizer.attribute[0].i
    assert (floats.dtype, axis) == (np.float32, 0 if transposed else 1)
    assert not np.signbit(floats[floats == 0]).any()
    quotient = np.rint(floats / np.expand_dims(divisor, 1 - axis))  # in float32, as QuantizeLinear does
    assert np.array_equal(quotient if transposed else quotient.T, integers.numpy())
    fake = torch.fake_quantize_per_channel_affine(
        integers.double().mul(scale[:, None].double()).float(),
        scale,
        torch.zeros(outputs, dtype=torch.int32),
        0,
        -127,
        127,
    )
    np.testing.assert_allclose(floats if transposed else floats.T, fake.numpy(), rtol=2.0**-22)


@pytest.mark.parametrize("form", ["dq", "qdq"])
def test_constants_of_a_weight_are_its_own(bert: Family, form: str) -> None:
    model = insert_qdq(bert.graph, bert.quantization(*PLACEMENTS["tensorrt"]), form)
    quantizers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    readers: dict[str, set[str]] = {}
    for node in quantizers:
        for name in node.input:
            readers.setdefault(name, set()).add(module_of(node))
    stored = {entry.name for entry in model.graph.initializer}
    assert all(len(modules) == 1 for name, modules in readers.items() if name in stored)
    assert sum("/weight/" in node.name for node in quantizers) == len(bert.weights) * (1 if form == "dq" else 2)
    assert any(name.endswith("weight_int8") for name in stored) == (form == "dq")


def test_scales_are_those_of_the_fake_quantizer(bert: Family) -> None:
    quantization = bert.quantization(*PLACEMENTS["attention"])
    model = insert_qdq(bert.graph, quantization)
    for site, amax in quantization.amax.items():
        scale = torch.tensor(amax, dtype=torch.float32) / 127
        stored = tensor(model, f"{site}_scale")
        assert (stored.dtype, stored.shape) == (np.float32, ())
        assert stored == scale.item()


def test_the_float_graph_stays_unchanged(bert: Family) -> None:
    before = bert.graph.SerializeToString(deterministic=True)
    insert_qdq(bert.graph, bert.quantization(*PLACEMENTS["tensorrt"]))
    assert bert.graph.SerializeToString(deterministic=True) == before


def test_two_sites_of_equal_scale_on_an_edge_are_one_pair(bert: Family) -> None:
    dense, add = "bert.encoder.layer.0.output.dense:output", "bert.encoder.layer.0.output:add0.left"
    amax = {site: a for site, a in bert.amax.items() if site.endswith(":input")}

    def count(**bounds: float) -> int:
        sites = amax | {dense: bounds["dense"], add: bounds["add"]}
        nodes = insert_qdq(bert.graph, QuantizedModel(bert.weights, sites)).graph.node
        return sum(node.op_type == "QuantizeLinear" for node in nodes)

    assert count(dense=2.0, add=2.0) == len(amax) + 1
    assert count(dense=2.0, add=1.5) == len(amax) + 2


class Twice(nn.Module):
    """A model that runs one layer twice, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.layer = nn.Linear(32, 32)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(self.layer(self.embed(input_ids))).sum(1))


def test_a_layer_that_runs_twice_is_quantized_twice() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    scale = model.layer.weight.detach().abs().amax(1) / 127
    integers = (model.layer.weight.detach() / scale[:, None]).round().to(torch.int8)
    graph = export_float(model, {"input_ids": torch.ones(2, 6, dtype=torch.long)})
    written = insert_qdq(graph, QuantizedModel({"layer": (integers, scale)}, {"layer:input": 3.0, "layer:output": 3.0}))
    assert verify(written) == []
    assert count_operators(optimized_graph(written.SerializeToString()))["MatMulIntegerToFloat"] == 2


@pytest.mark.parametrize("site", [
    "bert.encoder.layer.7.output.dense:input",
    "bert.encoder.layer.0.output:add1.left",
    "bert.encoder.layer.0.attention:query",
    "bert.encoder.layer.0.output:add0.middle",
    "nonsense",
])  # fmt: skip
def test_a_site_that_is_not_in_the_graph_is_named(bert: Family, site: str) -> None:
    quantization = bert.quantization()
    with pytest.raises(SqatError) as error:
        insert_qdq(bert.graph, QuantizedModel(quantization.weights, {**quantization.amax, site: 1.0}))
    assert error.value.code == "model-mismatch"


def test_a_layer_that_is_not_in_the_graph_is_named(bert: Family) -> None:
    layers = {"bert.no.such.layer": bert.weights[QUERY]}
    with pytest.raises(SqatError) as error:
        insert_qdq(bert.graph, QuantizedModel(layers, {}))
    assert error.value.code == "model-mismatch"


def test_a_layer_quantized_on_one_side_only_is_named(bert: Family) -> None:
    with pytest.raises(SqatError) as error:
        insert_qdq(bert.graph, QuantizedModel({QUERY: bert.weights[QUERY]}, {}))
    assert error.value.code == "model-mismatch"
    with pytest.raises(SqatError) as error:
        insert_qdq(bert.graph, QuantizedModel({}, {f"{QUERY}:input": 1.0}))
    assert error.value.code == "model-mismatch"


@pytest.mark.parametrize("amax", [0.0, -1.0, float("inf"), float("nan")])
def test_an_amax_that_is_not_positive(bert: Family, amax: float) -> None:
    with pytest.raises(ValueError, match=f"site {QUERY}:input has amax {amax}"):
        insert_qdq(bert.graph, QuantizedModel({QUERY: bert.weights[QUERY]}, {f"{QUERY}:input": amax}))


def test_a_weight_of_another_shape(bert: Family) -> None:
    wrong = (torch.zeros(32, 16, dtype=torch.int8), torch.ones(32))
    with pytest.raises(ValueError, match=rf"layer {QUERY}: weight \(16, 32\) in a graph that has \(32, 32\)"):
        insert_qdq(bert.graph, QuantizedModel({QUERY: wrong}, {f"{QUERY}:input": 1.0}))
