"""ONNX Runtime's int8 products are exact on this CPU, whatever it is, and its failures are one line."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sqat.errors import SqatError
from sqat.runtime.sessions import find_float_products, int8_saturates, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators

WIDE = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[batch, 64] x) => (float[batch, 32] logits)
<float s = {0.01}, int8 z = {0}, int8[64, 32] w, float[32] ws, int8[32] wz> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = 1>(w, ws, wz)
    logits = MatMul(d, wd)
}"""


def extreme_product() -> tuple[onnx.ModelProto, np.ndarray]:
    """One quantized product whose weights are all +-127, the worst that 16-bit sums can meet."""
    model = onnx.parser.parse_model(WIDE)
    weight = np.full((64, 32), 127, np.int8)
    weight[:, ::2] = -127
    values = {"w": weight, "ws": np.full(32, 0.01, np.float32), "wz": np.zeros(32, np.int8)}
    values |= {"s": np.float32(0.01), "z": np.int8(0)}
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    return model, weight


@pytest.mark.parametrize("fill", [-1.28, 1.27])
def test_int8_products_are_exact(fill: float) -> None:
    model, weight = extreme_product()
    x = np.full((3, 64), fill, np.float32)
    integers = np.clip(np.rint(x / np.float32(0.01)), -128, 127).astype(np.int64)
    exact = (integers @ weight.astype(np.int64)) * 1e-4
    got = run_batches(session(model.SerializeToString(), threads=1), [{"x": x}])
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.skipif(not int8_saturates(), reason="this CPU multiplies uint8 by int8 without saturation")
def test_without_the_option_they_are_not() -> None:
    """What the option is for: remove this test with it once ONNX Runtime is exact by itself."""
    model, weight = extreme_product()
    x = np.full((3, 64), 1.27, np.float32)
    plain = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    error = np.abs(plain.run(None, {"x": x})[0] - (np.full((3, 64), 127) @ weight.astype(np.int64)) * 1e-4)
    assert error.max() > 1


@pytest.mark.parametrize(("machine", "flags", "saturates"), [
    ("x86_64", "fpu avx2 fma", True),
    ("AMD64", None, True),
    ("x86_64", "avx2 avx512f avx512_vnni", False),
    ("x86_64", "avx2 avx_vnni", False),
    ("aarch64", "asimd", False),
])  # fmt: skip
def test_which_cpus_saturate(monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, saturates: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "exists", lambda self: flags is not None)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"flags : {flags}\n")
    assert int8_saturates() == saturates


def test_batches_are_joined_in_order_and_spare_inputs_dropped() -> None:
    model, weight = extreme_product()
    rows = np.eye(64, dtype=np.float32)
    runtime = session(model.SerializeToString(), threads=1)
    got = run_batches(runtime, ({"x": rows[i : i + 10], "spare": rows} for i in range(0, 64, 10)))
    np.testing.assert_allclose(got, 100 * weight.astype(np.int64) * 1e-4, rtol=1e-6)


def test_the_rewritten_graph_is_read_without_its_weights(tmp_path: Path) -> None:
    model, _ = extreme_product()
    plain = optimized_graph(model.SerializeToString())
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "weights").is_file()
    for graph in (plain, optimized_graph(path)):
        assert count_operators(graph)["MatMulIntegerToFloat"] == 1
        weight = max(graph.initializer, key=lambda entry: int(np.prod(entry.dims)))
        assert list(weight.dims) == [64, 32]
        assert not weight.raw_data
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "weights"]


@pytest.mark.parametrize(("op", "behind", "fault"), [
    ("MatMul", "Relu", True),
    ("FusedGemm", "QuantizeLinear", True),
    ("Conv", "QuantizeLinear", True),
    ("FusedConv", "Relu", False),
])  # fmt: skip
def test_which_float_products_are_a_fault(op: str, behind: str, fault: bool) -> None:
    make = onnx.helper.make_node
    pairs = [make("DequantizeLinear", [name, "s", "z"], [f"{name}d"]) for name in "xw"]
    nodes = [*pairs, make(op, ["xd", "wd"], ["y"], name="product"), make(behind, ["y"], ["out"])]
    assert find_float_products(onnx.helper.make_graph(nodes, "g", [], [])) == (["product"] if fault else [])
    nodes[2].input[1] = "other"
    assert find_float_products(onnx.helper.make_graph(nodes, "g", [], [])) == []


@pytest.mark.parametrize(("op", "faults"), [("MatMul", [True, True, False]), ("Conv", [False, True, False])])
@pytest.mark.parametrize("quantizers", [0, 1, 2])
def test_an_output_that_several_nodes_quantize_is_no_fault(op: str, quantizers: int, faults: list[bool]) -> None:
    make = onnx.helper.make_node
    nodes = [make("DequantizeLinear", [name, "s", "z"], [f"{name}d"]) for name in "xw"]
    nodes += [make(op, ["xd", "wd"], ["y"], name="product")]
    nodes += [make("QuantizeLinear", ["y", "s", "z"], [f"q{index}"]) for index in range(quantizers)]
    assert find_float_products(onnx.helper.make_graph(nodes, "g", [], [])) == ["product"] * faults[quantizers]


@pytest.mark.parametrize("name", ["product", "product/MatMulScaleFusion/"])
def test_a_product_of_heads_behind_their_dequantizers_is_float_by_design(name: str) -> None:
    make = onnx.helper.make_node
    pairs = [make("DequantizeLinear", [name, "s", "z"], [f"{name}d"]) for name in "xw"]
    direct = [*pairs, make("MatMul", ["xd", "wd"], ["y"], name="product")]
    heads = make("Reshape", ["xd", "shape"], ["heads"])
    split = [*pairs, heads, make("MatMul", ["heads", "wd"], ["y"], name="product")]
    optimized = onnx.helper.make_graph([*pairs, make("FusedMatMul", ["xd", "wd"], ["y"], name=name)], "g", [], [])
    assert find_float_products(optimized, onnx.helper.make_graph(direct, "g", [], [])) == [name]
    assert find_float_products(optimized, onnx.helper.make_graph(split, "g", [], [])) == []


def test_parity_is_the_largest_difference_and_nan_is_no_agreement() -> None:
    left, right = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([[1.0, 2.5], [2.0, 4.0]], np.float32)
    assert parity(left, right) == 1.0
    assert parity(left, left) == 0.0
    assert parity(left, np.where(right == 4, np.nan, left).astype(np.float32)) == np.inf
    with pytest.raises(ValueError, match=r"logits of shape \(2, 2\) against \(1, 2\)"):
        parity(left, right[:1])


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(SqatError) as caught:
        session(path)
    assert caught.value.code == "invalid-onnx"
    assert caught.value.place == str(path)
    assert "\n" not in str(caught.value)
