"""The rows that `sqat inspect` makes of ONNX files, of sqat and of other tools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from sqat.errors import SqatError
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.lint.layer_report import find_pattern, inspect_onnx, lint
from tests.onnx_models import Family

QUERY = "bert.encoder.layer.0.attention.self.query"


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_rows_of_an_int8_file(bert: Family, tmp_path: Path) -> None:
    rows = {row.name: row for row in inspect_onnx(save(insert_qdq(bert.graph, bert.quantization()), tmp_path))}
    assert set(rows) == {*bert.weights, "bert.pooler.dense", "classifier"}
    for layer, (integers, scale) in bert.weights.items():
        row = rows[layer]
        assert row.shape == tuple(integers.shape)
        assert row.pattern == "2:4"
        assert row.zeros == (integers == 0).float().mean().item()
        assert row.weight_scale == (scale.min().item(), scale.max().item())
        assert row.input_amax == pytest.approx(bert.amax[f"{layer}:input"], rel=1e-6)
        assert (row.sqnr_db, row.saturated) == (None, None)
    assert rows["classifier"].shape == (3, 32)
    assert rows["classifier"].reason == "3 channels are fewer than 16; not 2:4 along its inputs"
    assert rows["bert.pooler.dense"].reason == "its weight has no DequantizeLinear; not 2:4 along its inputs"


def test_rows_of_a_float_file_keep_the_pattern(bert: Family, tmp_path: Path) -> None:
    rows = {row.name: row for row in inspect_onnx(save(bert.graph, tmp_path))}
    assert rows[QUERY].pattern == "2:4"
    assert rows[QUERY].zeros >= 0.5
    assert rows[QUERY].weight_scale is None
    assert rows[QUERY].reason == "its weight has no DequantizeLinear"


FOREIGN = """<ir_version: 9, opset_import: ["" : 17]>
agraph (float[1, 8, 6, 6] x) => (float[1, 16, 16] y)
<float s = {0.5}, int8 z = {0}, int64[3] shape = {1, 16, 16}> {
    c = Conv(x, kernel)
    r = Reshape(c, shape)
    q = QuantizeLinear(weight, s, z)
    d = DequantizeLinear(q, s, z)
    t = Transpose<perm = [1, 0]>(d)
    y = MatMul(r, t)
}"""


def test_a_file_of_another_exporter(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(FOREIGN)
    kernel = np.ones((16, 8, 3, 3), np.float32)
    kernel[:, ::2] = 0
    weight = np.arange(256, dtype=np.float32).reshape(16, 16) + 1
    model.graph.initializer.append(numpy_helper.from_array(kernel, "kernel"))
    model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
    conv, linear = inspect_onnx(save(model, tmp_path))
    assert (conv.name, conv.shape, conv.pattern, conv.zeros) == ("kernel", (16, 8, 3, 3), "2:4", 0.5)
    assert (linear.name, linear.shape, linear.pattern) == ("weight", (16, 16), "dense")
    assert linear.weight_scale == (0.5, 0.5)
    assert linear.reason.startswith("its input has no Q/DQ pair; not 2:4 along its inputs; breaks B4 ")


NARROW = """<ir_version: 9, opset_import: ["" : 17]>
agraph (float[n, 32] x) => (float[n, 8] y) <float s = {0.1}, int8 z = {0}> {
    xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z)
    wd = DequantizeLinear(w, s, z)
    y = MatMul(xd, wd)
}"""


@pytest.mark.parametrize(("kept", "advice"), [
    (2, "see the reasons above: 1 of them have 2:4 weights"),
    (4, "prune to 2:4 (stage prune)"),
])  # fmt: skip
def test_who_has_pruned_already_is_not_told_to_prune(kept: int, advice: str) -> None:
    """Eight channels are too few for TensorRT's sparse kernels, whatever the weights."""
    model = onnx.parser.parse_model(NARROW)
    weight = np.ones((32, 8), np.int8)
    weight.reshape(8, 4, 8)[:, kept:] = 0
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    report = lint(model, "tensorrt")
    assert [layer.pattern for layer in report.layers] == ["2:4" if kept == 2 else "dense"]
    assert [found.advice for found in report.findings if found.problem == "no layer will run sparse"] == [advice]


@given(st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (5, 16)]), st.integers(0, 1), st.integers(0, 2**32 - 1))
def test_a_pattern_is_recognized(pattern: tuple[int, int], axis: int, seed: int) -> None:
    kept, group = pattern
    random = np.random.default_rng(seed)
    ranks = random.random((64, 8, group)).argsort(-1).argsort(-1)
    values = ((ranks < kept) * random.integers(1, 9, ranks.shape)).reshape(64, -1).astype(np.int8)
    assert find_pattern(values if axis == 1 else values.T, axis) == f"{kept}:{group}"


def test_patterns_at_the_edges() -> None:
    assert find_pattern(np.ones((16, 16), np.float32), 1) == "dense"
    assert find_pattern(np.zeros((16, 16), np.float32), 1) == "1:4"
    assert find_pattern(np.eye(6, dtype=np.float32), 1) == "dense"


def test_missing_external_data(bert: Family, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load_from_string(bert.graph.SerializeToString())
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert {row.name for row in inspect_onnx(path)} >= set(bert.weights)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(SqatError, match=r"weights\.bin") as error:
        inspect_onnx(path)
    assert (error.value.place, "\n" in str(error.value)) == (str(path), False)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [cut, lambda content: b"# a model card\n", lambda content: b""])
def test_a_damaged_file_is_refused(bert: Family, tmp_path: Path, damage) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(bert.graph.SerializeToString()))
    with pytest.raises(SqatError, match="not an ONNX file") as error:
        inspect_onnx(path)
    assert error.value.place == str(path)


def test_a_model_without_layers_and_a_path_without_a_file(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    with pytest.raises(SqatError) as error:
        inspect_onnx(save(model, tmp_path))
    assert error.value.code == "no-layer"
    with pytest.raises(SqatError, match=r"absent\.onnx: no such file"):
        inspect_onnx(tmp_path / "absent.onnx")


def test_a_half_quantized_layer_says_so(bert: Family, tmp_path: Path) -> None:
    model = insert_qdq(bert.graph, QuantizedModel({QUERY: bert.weights[QUERY]}, {f"{QUERY}:input": 1.0}))
    product = next(node for node in model.graph.node if node.name.endswith("layer.0/attention/self/query/MatMul"))
    for _ in ("DequantizeLinear", "QuantizeLinear"):
        product.input[0] = next(node for node in model.graph.node if node.output[0] == product.input[0]).input[0]
    row = next(row for row in inspect_onnx(save(model, tmp_path)) if row.name == QUERY)
    assert row.reason.startswith("its input has no Q/DQ pair; breaks B9 ")
