"""A repaired file is kept only if ONNX Runtime computes the same with it, on inputs that the graph takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_edits import parsed, quantized_weight
from onnx import ModelProto, TensorProto, helper

from sqat.cli import main
from sqat.lint import repair_file as repairs
from sqat.lint.compare import are_equal, draw_inputs, require_equal
from sqat.lint.findings import Change
from sqat.lint.graph_view import GraphView
from sqat.lint.repair_file import repair_file

PAIR = """agraph (float[n, 64] x) => (float[n, 64] y) <float s = {0.01}, %(zero)s> {
    q = QuantizeLinear%(q)s(x, s%(input)s)
    d = DequantizeLinear%(d)s(q, s%(input)s)
    e = DequantizeLinear<axis = 1>(w, ws, wz)
    y = MatMul(d, e)
}"""
UINT8, INT8 = int(TensorProto.UINT8), int(TensorProto.INT8)


def pair(zero: str = "int8 z = {0}", q: str = "", d: str = "", operand: str = ", z", opset: int = 21) -> ModelProto:
    return parsed(PAIR % {"zero": zero, "q": q, "d": d, "input": operand}, opset=opset, **quantized_weight())


def save(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("target", ["tensorrt", "onnx-int8"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pair("uint8 z = {128}", f"<output_dtype = {UINT8}>"),
        lambda: pair("uint8 z = {128}"),
        lambda: pair("uint8 z = {128}", opset=13),
        lambda: pair("int8 z = {0}", f"<output_dtype = {INT8}>"),
        lambda: pair("int8 unused = {0}", f"<output_dtype = {INT8}>", operand=""),
        lambda: pair("int8 unused = {0}", f"<output_dtype = {UINT8}>", operand=""),
        lambda: pair("uint8 z = {127}", f"<output_dtype = {UINT8}>"),
        lambda: pair("uint4 z = {8}", f"<output_dtype = {int(TensorProto.UINT4)}>"),
        lambda: pair("int4 z = {0}"),
        lambda: pair("uint16 z = {32768}"),
        lambda: pair("float8e4m3fn z = {0}"),
        lambda: pair("float8e4m3fn unused = {0}", f"<output_dtype = {int(TensorProto.FLOAT8E4M3FN)}>", operand=""),
    ],
)
def test_what_is_written_runs_and_computes_the_same(
    make: Callable[[], ModelProto], target: str, tmp_path: Path
) -> None:
    path = save(make(), tmp_path)
    _, result = repair_file(path, target)
    written = sorted(file.name for file in tmp_path.iterdir())
    if result.path is None:
        assert written == ["model.onnx"]
        assert result.changes == []
        return
    assert written == ["model.fixed.onnx", "model.onnx"]
    onnx.checker.check_model(result.path, full_check=True)
    require_equal(path, result.path, onnx.load(path), is_exact=True)


@pytest.mark.parametrize("opset", [20, 21])
def test_uint8_around_128_is_repaired(opset: int, tmp_path: Path) -> None:
    model = pair("uint8 z = {128}", f"<output_dtype = {UINT8}>" if opset > 20 else "", opset=opset)
    report, result = repair_file(save(model, tmp_path), "tensorrt")
    assert "uint8 around 128 became int8 around 0" in {change.text for change in result.changes}
    assert not [finding for finding in report.findings if finding.rule == "B2"]


def break_scale(model: ModelProto) -> None:
    """Another number: the file runs, and computes something else."""
    next(tensor for tensor in model.graph.initializer if tensor.name == "ws").raw_data = np.full(
        64, 2, np.float32
    ).tobytes()


def break_type(model: ModelProto) -> None:
    """A file that ONNX Runtime refuses."""
    model.graph.node[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.INT16))


@pytest.mark.parametrize(
    ("edit", "problem"), [(break_scale, "computes other numbers"), (break_type, "cannot be compared")]
)
@pytest.mark.parametrize("output", [None, "model.onnx", "other.onnx"])
def test_a_wrong_repair_is_not_written(
    edit: Callable[[ModelProto], None], problem: str, output: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = save(pair("uint8 z = {128}"), tmp_path)
    before = path.read_bytes()

    def fix(model: ModelProto, target: str) -> tuple[ModelProto, list[Change]]:
        changed = ModelProto.FromString(model.SerializeToString())
        edit(changed)
        return changed, [Change("B2", "q", "wrong")]

    monkeypatch.setattr(repairs, "fix", fix)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "model.onnx", "--fix", *(["--output", output] if output else [])]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "no file written:" in shown
    assert problem in shown
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before
    report, result = repair_file(path, "tensorrt")
    assert problem in result.problem
    assert {finding.fixable for finding in report.findings} == {False}
    assert "B2" in {finding.rule for finding in report.findings}


def test_a_file_that_does_not_run_is_not_repaired(tmp_path: Path) -> None:
    text = (PAIR % {"zero": "uint8 z = {128}", "q": "", "d": "", "input": ", z"}).replace(
        "y = MatMul(d, e)", "m = MatMul(d, e) y = my.Op(m)"
    )
    _, result = repair_file(save(parsed(text, imports=', "my": 1', **quantized_weight()), tmp_path), "onnx-int8")
    assert "the file itself cannot be compared" in result.problem
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_inputs_fit_the_graph() -> None:
    model = parsed(
        """agraph (int64[batch, s] ids, int64[batch, s] mask, float[batch, 3, h, w] image, bool[2] flag) => (float y) {
            c = Cast<to = 6>(ids) g = Gather(table, c) y = ReduceSum(g)
        }""",
        table=np.zeros((5, 2), np.float32),
    )
    feeds = draw_inputs(GraphView(model), (2, 300))
    shapes = {name: (value.shape, value.dtype.name) for name, value in feeds.items()}
    assert shapes == {
        "ids": ((2, 300), "int64"),
        "mask": ((2, 300), "int64"),
        "image": ((2, 3, 300, 300), "float32"),
        "flag": ((2,), "bool"),
    }
    assert set(np.unique(feeds["ids"])) == set(range(5))
    assert set(np.unique(feeds["mask"])) == {0, 1}


@pytest.mark.parametrize(
    ("before", "after", "exact", "rounded"),
    [
        ([1.0, np.nan], [1.0, np.nan], True, True),
        ([1.0, -0.0], [1.0, 0.0], True, True),
        ([1.0, 2.0], [1.0, 2.001], False, True),
        ([1.0, 2.0], [1.0, 2.1], False, False),
        ([1.0, 2.0], [1.0, np.nan], False, False),
        ([1, 2], [1, 3], False, False),
        ([[1.0]], [1.0], False, False),
    ],
)
def test_equal_numbers(before: list[float], after: list[float], exact: bool, rounded: bool) -> None:
    for is_exact, expected in ((True, exact), (False, rounded)):
        assert are_equal(np.array(before), np.array(after), is_exact=is_exact) == expected
