"""`sqat inspect` of graphs: what it prints and writes, and its exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_graphs import set_negative_zeros, share_pair
from graph_edits import ENCODER, SELF, bypass, node

from sqat import cli
from sqat.export.qdq import insert_qdq
from sqat.onnx_files.read import read_onnx
from tests.onnx_models import Family

Command = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `sqat inspect` in an empty folder at 80 columns; exit code, lines of output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("SQAT_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: str) -> tuple[int, list[str], str]:
        code = cli.main(["inspect", *arguments])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.strip()

    return run


@pytest.fixture
def good(written: bytes, tmp_path: Path) -> onnx.ModelProto:
    """A file in order, written to model.onnx."""
    (tmp_path / "model.onnx").write_bytes(written)
    return onnx.load_from_string(written)


@pytest.fixture
def broken(written: bytes, tmp_path: Path) -> onnx.ModelProto:
    """A file with findings that can be repaired (B7, B10) and some that cannot (T16, T17), in broken.onnx."""
    model = onnx.load_from_string(written)
    share_pair(model)
    set_negative_zeros(model)
    bypass(model, f"{ENCODER}/output/dense/output")
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    return model


def test_a_table_says_how_each_layer_would_run(command: Command, broken: onnx.ModelProto) -> None:
    code, lines, error = command("broken.onnx")
    assert (code, error) == (0, "")
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["layer", "shape", "N:M", "zero%", "scale", "amax", "runs", "as"]
    rows = {line.split()[0]: line.split("2:4")[-1].split()[3:] for line in lines[2:] if line.startswith("~")}
    assert rows["~1.output.dense"] == ["sparse", "int8"]
    assert rows["~0.output.dense"][:2] == ["dense", "int8"]
    assert rows["~0.attention.self.query"][:1] == ["float"]
    assert "c: breaks T16 (int8 out: the output reaches a Q behind bias and changes of layout)" not in lines
    assert "~ is bert.encoder.layer." in lines


def test_a_file_in_order(command: Command, good: onnx.ModelProto) -> None:
    code, lines, error = command("model.onnx", "--target", "tensorrt")
    assert (code, error) == (0, "")
    assert lines[:2] == [
        "12 of 14 layers will run sparse int8 on tensorrt",
        "where that is faster than dense, which the engine's builder finds out by timing",
    ]
    assert lines[3:] == [
        "     1  float         its weight has no DequantizeLinear; not 2:4 along its",
        "                      inputs",
        "     1  float         3 channels are fewer than 16; not 2:4 along its inputs",
    ]
    assert command("model.onnx", "--target", "onnx-int8")[1][0] == "12 of 14 layers will run in int8 on onnx-int8"


def test_findings_are_listed_with_nodes_and_what_to_do(command: Command, broken: onnx.ModelProto) -> None:
    code, lines, error = command("broken.onnx", "--target", "tensorrt")
    assert code == 3
    assert error == "error: broken.onnx: breaks 3 rules of target tensorrt in 5 places; --fix repairs 4 of them"
    assert max(len(line) for line in lines) <= 80
    assert lines[0] == "8 of 14 layers will run sparse int8 on tensorrt"
    start = lines.index("T16 error, 1 node: its output stays float: it goes to Add")
    assert lines[start + 1 : start + 4] == [
        f"    at  {ENCODER}/output/dense/MatMul",
        "  asks  int8 out: the output reaches a Q behind bias and changes of layout",
        "   fix  calibrate with placement tensorrt, so that outputs, residual adds and",
    ]
    assert "B7 error, 1 node, --fix repairs it: 3 weights are -0.0" in lines
    severities = [line.split()[1].strip(",:") for line in lines if line.startswith(("B", "T"))]
    assert severities == ["error", "error", "error", "warning"]


def test_a_problem_of_many_nodes_is_printed_once(command: Command, bert: Family, tmp_path: Path) -> None:
    (tmp_path / "linear.onnx").write_bytes(insert_qdq(bert.graph, bert.quantization()).SerializeToString())
    code, lines, _ = command("linear.onnx", "--target", "tensorrt")
    assert code == 3
    start = lines.index("T16 error, 6 nodes: its output stays float: it goes to MatMul")
    names = [f"{SELF}/{part}/MatMul" for part in ("query", "key", "value")]
    assert [line.split()[-1] for line in lines[start + 1 : start + 4]] == names
    assert lines[start + 4] == "        and 3 more (all with --json)"
    content = json.loads("\n".join(command("linear.onnx", "--target", "tensorrt", "--json")[1]))
    assert len([f for f in content["findings"] if f["problem"].endswith("MatMul")]) == 6


def test_json_holds_everything(command: Command, broken: onnx.ModelProto) -> None:
    code, lines, _ = command("broken.onnx", "--target", "tensorrt", "--json")
    content = json.loads("\n".join(lines))
    assert code == 3
    assert (content["path"], content["target"], content["changes"], content["written"]) == (
        "broken.onnx",
        "tensorrt",
        [],
        None,
    )
    assert content["summary"] == {
        "text": "8 of 14 layers will run sparse int8 on tensorrt",
        "layers": 14, "running": 8, "doubtful": 0, "errors": 5, "warnings": 1,
    }  # fmt: skip
    (finding,) = [f for f in content["findings"] if f["rule"] == "B7"]
    assert finding["node"] == "/classifier/Gemm"
    assert finding["fixable"]
    assert all(f["requirement"] and f["advice"] for f in content["findings"])
    assert {layer["runs"] for layer in content["layers"]} == {"sparse int8", "dense int8", "float"}
    table = json.loads("\n".join(command("broken.onnx", "--json")[1]))
    assert {layer["name"]: layer["runs"] for layer in table["layers"]} == {
        layer["name"]: layer["runs"] for layer in content["layers"]
    }


def test_fix_writes_a_new_file_and_lists_its_changes(command: Command, broken: onnx.ModelProto, tmp_path: Path) -> None:
    before = (tmp_path / "broken.onnx").read_bytes()
    code, lines, error = command("broken.onnx", "--fix")
    assert code == 3
    assert error == "error: broken.onnx: breaks 1 rule of target tensorrt in 1 place"
    assert max(len(line) for line in lines) <= 80
    assert lines[0].startswith("broken.fixed.onnx: ")
    assert "B7, 1 node: made 3 zeros +0.0" in lines
    assert "11 of 14 layers will run sparse int8 on tensorrt" in lines
    assert (tmp_path / "broken.onnx").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"broken.onnx", "broken.fixed.onnx"}
    assert command("broken.fixed.onnx", "--fix", "--target", "onnx-int8")[:2][0] == 0
    again = command("broken.fixed.onnx", "--fix")[1]
    assert again[0] == "nothing here that --fix can repair, no file written"


def test_fix_as_json(command: Command, broken: onnx.ModelProto) -> None:
    content = json.loads("\n".join(command("broken.onnx", "--fix", "--json")[1]))
    assert content["written"] == "broken.fixed.onnx"
    assert {"rule": "B7", "node": "classifier.weight", "text": "made 3 zeros +0.0"} in content["changes"]


def test_the_input_is_overwritten_only_by_name(command: Command, broken: onnx.ModelProto, tmp_path: Path) -> None:
    assert command("broken.onnx", "--fix", "--output", "broken.onnx")[0] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"broken.onnx"}
    assert command("broken.onnx", "--fix")[1][0] == "nothing here that --fix can repair, no file written"
    (tmp_path / "elsewhere").mkdir()
    assert command("broken.onnx", "--fix", "--output", "elsewhere/copy.onnx")[0] == 3
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"copy.onnx"}


def test_external_data_stays_external(command: Command, broken: onnx.ModelProto, tmp_path: Path) -> None:
    tensors = {tensor.name: tensor for tensor in broken.graph.initializer}
    onnx.save(broken, tmp_path / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    before = (tmp_path / "weights.bin").read_bytes()
    assert command("big.onnx", "--fix")[0] == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"broken.onnx", "big.onnx", "weights.bin", "big.fixed.onnx", "big.fixed.onnx.data"}
    assert (tmp_path / "weights.bin").read_bytes() == before
    fixed = read_onnx(tmp_path / "big.fixed.onnx")
    weight = next(t for t in fixed.graph.initializer if t.name == "classifier.weight")
    values = onnx.numpy_helper.to_array(weight)
    assert not np.signbit(values[values == 0]).any()
    np.testing.assert_array_equal(values, onnx.numpy_helper.to_array(tensors["classifier.weight"]))
    assert command("big.onnx", "--fix", "--output", "big.onnx")[0] == 3
    assert command("big.onnx", "--target", "onnx-int8")[0] == 0
    (tmp_path / "big.fixed.onnx.data").unlink()
    code, _, error = command("big.fixed.onnx", "--target", "tensorrt")
    assert code == 2
    assert error.startswith("error: big.fixed.onnx: its external data cannot be read: ")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["model.onnx", "--target", "cuda"], "--target: no target 'cuda' to lint for"),
        (["folder", "--target", "tensorrt"], "folder: a checkpoint folder has no graph"),
        (["folder", "--fix"], "folder: a checkpoint folder has no graph"),
        (["model.onnx", "--output", "x.onnx"], "--output: needs --fix"),
        (["model.onnx", "--fix", "--output", "folder"], "folder: is a folder; name a file"),
        (["model.onnx", "--fix", "--output", "gone/x.onnx"], "gone: the folder does not exist"),
        (["text.onnx", "--target", "tensorrt"], "text.onnx: "),
        (["short.onnx", "--fix"], "short.onnx: "),
        (["relu.onnx", "--target", "tensorrt"], "relu.onnx: holds no MatMul"),
    ],
)
def test_a_mistake_is_one_line(
    command: Command, good: onnx.ModelProto, tmp_path: Path, arguments: list[str], error: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.onnx").write_text("# a model card\n")
    (tmp_path / "short.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-1000])
    relu = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    (tmp_path / "relu.onnx").write_bytes(relu.SerializeToString())
    code, lines, message = command(*arguments)
    assert (code, lines) == (2, [])
    assert message.startswith(f"error: {error}")
    assert "\n" not in message


def test_a_file_without_quantized_layers_says_so(command: Command, bert: Family, tmp_path: Path) -> None:
    (tmp_path / "float.onnx").write_bytes(bert.graph.SerializeToString())
    code, lines, error = command("float.onnx", "--target", "tensorrt")
    assert (code, error) == (3, "error: float.onnx: breaks 1 rule of target tensorrt in 1 place")
    assert lines[0] == "0 of 14 layers will run sparse int8 on tensorrt"
    assert "layers error: holds no quantized layer, so none will run in int8" in lines
    assert command("float.onnx", "--target", "onnx-fp32")[:2][0] == 0


def test_an_invalid_graph_is_told_in_the_words_of_the_checker(
    command: Command, good: onnx.ModelProto, tmp_path: Path
) -> None:
    node(good, f"{SELF}/query/MatMul").input[0] = "nowhere"
    (tmp_path / "model.onnx").write_bytes(good.SerializeToString())
    for more in ([], ["--target", "tensorrt"], ["--fix"]):
        code, lines, error = command("model.onnx", *more)
        assert (code, lines) == (2, [])
        assert "nowhere" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
