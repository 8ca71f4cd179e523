"""Float16 graphs: types that agree everywhere, numbers near float32, the same integers, and no way to overflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from sqat.bench.candidates import openvino_core
from sqat.errors import SqatError
from sqat.export.conv1x1 import to_conv1x1
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.apply_rules import list_findings
from sqat.runtime.sessions import parity, run_batches, session
from tests.onnx_models import ATTENTION, Family, ImageFamily, build_family, rtx_weight_bytes

TENSORRT = ("output", *ATTENTION, "add")
# Left padding up to ModernBERT's window: a row that sees nothing is an average of all in float32, and not in half.
BATCHES = [(1, 2, "right"), (3, 9, "right"), (4, 8, "left"), (2, 33, "right"), (8, 7, "left")]
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
NOISE_FACTOR = 3
QUERY = "bert.encoder.layer.0.attention.self.query"


def quantized(family: Family, weights: str = "dq") -> ModelProto:
    return fold_attention_scale(insert_qdq(family.graph, family.quantization(*family.roles(*TENSORRT)), weights))


FORMS: dict[str, Callable[[Family], ModelProto]] = {
    "float": lambda family: fold_attention_scale(family.graph),
    "dq": quantized,
    "qdq": lambda family: quantized(family, "qdq"),
    "conv1x1": lambda family: to_conv1x1(quantized(family)),
}


def inferred(model: ModelProto) -> dict[str, int]:
    """Types of all tensors, by ONNX's strict inference from the inputs alone."""
    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    onnx.checker.check_model(bare, full_check=True)
    full = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*full.input, *full.value_info, *full.output)}
    return values | {entry.name: entry.data_type for entry in full.initializer}


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


def arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


@contextmanager
def shaken_norms(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Every norm's output off by half precision's rounding."""
    generator = torch.Generator().manual_seed(seed)

    def shake(module: torch.nn.Module, args: object, y: Tensor) -> Tensor:
        return y * (1 + 2.0**-11 * torch.randn(y.shape, generator=generator))

    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    handles = [module.register_forward_hook(shake) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("form", FORMS)
def test_types_agree_everywhere(family: Family, form: str) -> None:
    check_types(FORMS[form](family), to_float16(FORMS[form](family)))


@pytest.mark.parametrize("form", FORMS)
def test_types_of_images_agree(vit: ImageFamily, form: str) -> None:
    check_types(FORMS[form](vit), to_float16(FORMS[form](vit)))


def check_types(before: ModelProto, after: ModelProto) -> None:
    types = inferred(after)
    declared = {v.name: v.type.tensor_type.elem_type for v in after.graph.value_info}
    assert {name: types[name] for name in declared} == declared
    assert after.graph.input == before.graph.input
    assert [(v.name, v.type.tensor_type.elem_type) for v in after.graph.output] == [("logits", FLOAT)]
    for node in after.graph.node:
        floats = {types[name] for name in (*node.input, *node.output) if types.get(name) in (HALF, FLOAT)}
        assert len(floats) <= 1 or node.op_type == "Cast", node.name
        if node.op_type in ("MatMul", "Gemm", "Conv", "Softmax", "Gelu"):
            assert floats == {HALF}, node.name
        if node.op_type == "LayerNormalization":
            assert floats == {FLOAT}
    assert len({node.name for node in after.graph.node}) == len(after.graph.node)


@pytest.mark.parametrize("form", ["float", "dq"])
def test_the_rules_hold(family: Family, form: str) -> None:
    target = "onnx-fp16" if form == "float" else "tensorrt"
    found = list_findings(to_float16(FORMS[form](family)), dict.fromkeys(family.weights, "2:4"), target)
    assert [str(finding) for finding in found if not finding.warning] == []


def test_float_logits_are_near(family: Family) -> None:
    runtime = session(to_float16(family.graph).SerializeToString(), threads=1)
    found, explained = 0.0, 0.0
    for batch, sequence, side in BATCHES:
        inputs = family.inputs(batch, sequence, side, seed=6)
        with torch.no_grad():
            expected = family.model(**inputs).logits.numpy()
            with shaken_norms(family.model, seed=0):
                explained = max(explained, parity(expected, family.model(**inputs).logits.numpy()))
        found = max(found, parity(expected, run_batches(runtime, [arrays(inputs)])))
    assert 0 < found < NOISE_FACTOR * explained


def test_quantized_logits_are_near(family: Family) -> None:
    quantization = family.quantization(*family.roles(*TENSORRT))
    runtimes = [session(to_float16(FORMS[form](family)).SerializeToString(), threads=1) for form in ("dq", "qdq")]
    found, explained = 0.0, 0.0
    for batch, sequence, side in BATCHES:
        inputs = family.inputs(batch, sequence, side, seed=6)
        expected = family.reference(quantization, inputs).numpy()
        with shaken_norms(family.model, seed=0):
            explained = max(explained, parity(expected, family.reference(quantization, inputs).numpy()))
        got = [run_batches(runtime, [arrays(inputs)]) for runtime in runtimes]
        found = max(found, parity(expected, got[0]))
        assert parity(*got) == 0
    assert 0 < found < NOISE_FACTOR * explained


def test_images_are_near(vit: ImageFamily) -> None:
    runtime = session(to_float16(vit.graph).SerializeToString(), threads=1)
    found, explained = 0.0, 0.0
    for batch in (1, 2, 3, 5, 8):
        inputs = vit.inputs(batch, seed=6)
        with torch.no_grad():
            expected = vit.model(**inputs).logits.numpy()
            with shaken_norms(vit.model, seed=0):
                explained = max(explained, parity(expected, vit.model(**inputs).logits.numpy()))
        found = max(found, parity(expected, run_batches(runtime, [arrays(inputs)])))
    assert 0 < found < NOISE_FACTOR * explained


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_every_step_rounded_to_float16(name: str) -> None:
    """ONNX Runtime computes in float32 between casts; numpy, behind ONNX's reference, does not."""
    family = build_family(name)
    model = to_float16(fold_attention_scale(family.graph))
    for batch, sequence, side in BATCHES[1:3]:
        inputs = family.inputs(batch, sequence, side, seed=6)
        with torch.no_grad():
            expected = family.model(**inputs).logits.numpy()
        names = {value.name for value in model.graph.input}
        feeds = {key: value for key, value in arrays(inputs).items() if key in names}
        got = ReferenceEvaluator(model).run(None, feeds)[0]
        assert parity(expected, got) < 2e-2


def test_int8_products_still_read_dequantized_operands(family: Family) -> None:
    before, after = quantized(family), to_float16(quantized(family))
    origin = [{name: node for node in model.graph.node for name in node.output} for model in (before, after)]

    def products(index: int, model: ModelProto) -> list[str]:
        return [node.name for node in model.graph.node if node.op_type == "MatMul"
                and all(name in origin[index] and origin[index][name].op_type == "DequantizeLinear"
                        for name in node.input)]  # fmt: skip

    assert products(0, before) == products(1, after)
    assert len(products(1, after)) >= len(family.weights)
    stored = constants(after)
    for layer, (integers, _) in family.weights.items():
        assert np.array_equal(stored[f"{layer}.weight_int8"], integers.t().numpy())


def test_openvino_runs_them_in_int8(bert: Family) -> None:
    pytest.importorskip("openvino")
    core = openvino_core()
    model = core.read_model(to_float16(quantized(bert)).SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = Counter(
        info["layerType"].astype(str)
        for info in (op.get_rt_info() for op in compiled.get_runtime_model().get_ops())
        if info["runtimePrecision"].astype(str) in ("i8", "u8")
        and info["layerType"].astype(str) in ("FullyConnected", "MatMul", "Subgraph")
    )
    assert kinds["FullyConnected"] == len(bert.weights)
    # Attention's two products a layer: by themselves, or, where the CPU has AMX, both in one fused kernel.
    assert kinds["MatMul"] == 4 or kinds["Subgraph"] == 2


def test_weights_are_float16_and_zeros_positive(bert: Family) -> None:
    before, after = constants(bert.graph), constants(to_float16(bert.graph))
    assert sum(a.nbytes for a in after.values()) < 0.55 * sum(a.nbytes for a in before.values())
    for name, linear in bert.sites({}).linears().items():
        stored = after[f"{name}.weight"]
        assert stored.dtype == np.float16
        assert np.array_equal(stored == 0, linear.weight.detach().t().numpy() == 0)
        assert not np.signbit(stored[stored == 0]).any()
        np.testing.assert_allclose(stored, linear.weight.detach().t().numpy(), rtol=2.0**-11, atol=2.0**-25)


# Single operators


def parsed(body: str, inputs: str, **values: object) -> ModelProto:
    """A graph from text, ending in ``logits``; types of what lies between are inferred."""
    text = f'<ir_version: 9, opset_import: ["" : 20]>\nagraph ({inputs}) => (float[N, M] logits) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    for node in model.graph.node:
        node.name = f"/some/{node.op_type}_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


LOOKUP = "x = Gather(table, ids) "
MASKS = {
    "where": "b = Cast<to = 9>(mask) m = Where(b, zero, lowest) s = Add(x, m) logits = Softmax(s)",
    "filled": "n = Shape(mask) f = ConstantOfShape<value = float[1] {-3.4028234663852886e38}>(n) b = Cast<to = 9>(mask)"
    " m = Where(b, zero, f) s = Add(x, m) logits = Softmax(s)",
    "expanded": "n = Shape(mask) f = Expand(lowest, n) b = Cast<to = 9>(mask) m = Where(b, zero, f) s = Add(x, m)"
    " logits = Softmax(s)",
    "multiplied": "c = Cast<to = 1>(mask) i = Sub(one, c) m = Mul(i, lowest) s = Add(x, m) logits = Softmax(s)",
    "in half": "b = Cast<to = 9>(mask) s = Where(b, x, lowest) logits = Softmax(s)",
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_stay_finite(mask: str) -> None:
    """Also with scores that half's lowest number would turn into -inf, and with rows in which all is masked."""
    scores = np.array([[-40, -41, -60, 0], [-500, -40, -17, -20]], np.float32)
    values = {"table": scores, "zero": np.float32(0), "one": np.float32(1)}
    values |= {"lowest": np.array([np.finfo(np.float32).min], np.float32)} if "lowest" in MASKS[mask] else {}
    values = {key: value for key, value in values.items() if key == "table" or f"{key}" in MASKS[mask]}
    model = to_float16(parsed(LOOKUP + MASKS[mask], "int64[N] ids, int64[N, M] mask", **values))
    inferred(model)
    held = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    got = ReferenceEvaluator(model).run(None, {"ids": np.array([0, 1]), "mask": held})[0]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-2)
    np.testing.assert_allclose(got[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0, 0], atol=2e-3)


def test_angles_of_far_positions_are_those_of_float32() -> None:
    body = LOOKUP + "p = Cast<to = 1>(ids) q = Unsqueeze(p, last) a = Mul(q, frequency) c = Cos(a) logits = Mul(x, c)"
    frequency = np.array([[1.0, 0.3]], np.float32)
    table = np.ones((5000, 2), np.float32)
    model = to_float16(parsed(body, "int64[N] ids", table=table, frequency=frequency, last=np.array([1])))
    positions = np.array([0, 100, 2049, 4999])
    got = ReferenceEvaluator(model).run(None, {"ids": positions})[0]
    np.testing.assert_allclose(got, np.cos(positions[:, None] * frequency.astype(np.float64)), atol=2e-3)
    assert np.abs(np.cos(positions.astype(np.float16)[:, None] * frequency.astype(np.float16)) - got).max() > 0.1


def test_a_number_below_float16_keeps_its_operation_in_float() -> None:
    body = LOOKUP + "v = Mul(x, x) e = Add(v, epsilon) r = Sqrt(e) logits = Div(x, r)"
    table = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    model = to_float16(parsed(body, "int64[N] ids", table=table, epsilon=np.float32(1e-9)))
    inferred(model)
    got = ReferenceEvaluator(model).run(None, {"ids": np.array([0, 1])})[0]
    assert np.array_equal(got, [[0, 1], [1, 1]])


@pytest.mark.parametrize("value", [65505.0, -7e4, 1e30])
def test_a_weight_beyond_float16_is_named(value: float) -> None:
    weight = np.eye(4, dtype=np.float32)
    weight[1, 2] = value
    model = parsed(LOOKUP + "logits = MatMul(x, w)", "int64[N] ids", table=np.eye(4, dtype=np.float32), w=weight)
    with pytest.raises(SqatError) as error:
        to_float16(model)
    assert error.value.code == "unsupported-model"


def test_negative_weights_that_vanish_become_positive_zeros() -> None:
    weight = np.array([[-1e-9, 1e-9, -0.0, 65504.0]], np.float32).T
    model = parsed(LOOKUP + "logits = MatMul(x, w)", "int64[N] ids", table=np.eye(4, dtype=np.float32), w=weight)
    stored = constants(to_float16(model))["w"]
    assert stored.tolist() == [[0], [0], [0], [65504]]
    assert not np.signbit(stored).any()


@given(st.floats(2.0**-13, 500.0, width=32), st.sampled_from(["dq", "qdq"]))
def test_int8_weights_survive(scale: float, weights: str) -> None:
    """Float16 weights give back the int8 ones exactly when they pass the Q, for all of them and any scale."""
    integers = np.arange(-127, 128, dtype=np.int8).reshape(-1, 1)
    values = {"w": integers, "ws": np.float32([scale]), "wz": np.int8([0]), "s": np.float32(1), "z": np.int8(0)}
    weight = "wd = DequantizeLinear<axis = 1>(w, ws, wz)"
    if weights == "qdq":
        values["w"] = integers * np.float32([scale])
        weight = "wq = QuantizeLinear<axis = 1>(w, ws, wz) wd = DequantizeLinear<axis = 1>(wq, ws, wz)"
    body = f"{LOOKUP} q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {weight} logits = MatMul(d, wd)"
    stored = constants(to_float16(parsed(body, "int64[N] ids", table=np.eye(255, dtype=np.float32)[:1], **values)))
    assert stored["ws"].dtype == np.float16
    if weights == "qdq":
        assert stored["w"].dtype == np.float16
        stored["w"] = np.rint(stored["w"] / stored["ws"])  # in half, as QuantizeLinear does
    assert np.array_equal(stored["w"], integers)


def small_scale_model(bert: Family) -> tuple[ModelProto, QuantizedModel]:
    """The query linear reads activations on a grid finer than half's normal numbers."""
    complete = bert.quantization("output")
    quantization = QuantizedModel(complete.weights, complete.amax | {f"{QUERY}:input": 127 * 2e-5})
    return insert_qdq(bert.graph, quantization), quantization


def test_a_product_with_a_small_scale_stays_in_float(bert: Family) -> None:
    before, quantization = small_scale_model(bert)
    model = to_float16(before)
    types = inferred(model)
    nodes = {node.name: node for node in model.graph.node}
    place = "/bert/encoder/layer.0/attention/self/query"

    def of(node: NodeProto) -> set[int]:
        return {types[name] for name in (*node.input, *node.output)} & {HALF, FLOAT}

    for name in ("MatMul", "Add", "input/QuantizeLinear", "input/DequantizeLinear", "weight/DequantizeLinear"):
        assert of(nodes[f"{place}/{name}"]) == {FLOAT}
    assert nodes[f"{place}/MatMul"].input[0] == nodes[f"{place}/input/DequantizeLinear"].output[0]
    assert nodes[f"{place}/Add"].input[0] == nodes[f"{place}/MatMul"].output[0]
    assert of(nodes[f"{place.replace('query', 'key')}/MatMul"]) == {HALF}
    assert [str(f) for f in list_findings(model, target="tensorrt") if f.rule == "T18"] == []
    inputs = bert.inputs(3, 9, seed=2)
    expected = bert.reference(quantization, inputs).numpy()
    assert parity(expected, run_batches(session(model.SerializeToString(), threads=1), [arrays(inputs)])) < 0.3


def test_the_given_graph_stays_unchanged(bert: Family) -> None:
    model = quantized(bert)
    before = model.SerializeToString(deterministic=True)
    to_float16(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("name", "form"), [("modernbert", "float"), ("bert", "dq"), ("mpnet", "qdq")])
def test_tensorrt_builds_it_smaller(name: str, form: str) -> None:
    model = FORMS[form](build_family(name))
    assert rtx_weight_bytes(to_float16(model)) < rtx_weight_bytes(model)


def test_tensorrt_builds_images(vit: ImageFamily) -> None:
    assert rtx_weight_bytes(to_float16(to_conv1x1(quantized(vit)))) < rtx_weight_bytes(quantized(vit))
