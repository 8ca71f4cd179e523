"""Engines that TensorRT-RTX builds without a GPU, with the script that export writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from sqat.cli import main
from sqat.errors import SqatError
from sqat.export.engine_files import make_engine_files
from sqat.tensorrt.backends import build_engine
from sqat.tensorrt.build_log import read_log
from sqat.tensorrt.command import build_report, read_report
from tests.tensorrt.encoder import encoder

pytest.importorskip("tensorrt_rtx")

SHAPES = {"hidden": [[1, 4, 32], [2, 8, 32], [4, 16, 32]]}


def save(model: ModelProto, folder: Path, name: str = "model.tensorrt.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and what was built from it."""
    folder = tmp_path_factory.mktemp("built")
    build_engine(save(encoder(), folder), folder / "model.tensorrt.engine", SHAPES, backend="tensorrt-rtx", half=False)
    return folder


def test_the_command_builds_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(encoder(), tmp_path)
    assert main(["engine", str(model), "--batch", "1,2,4", "--sequence", "4,8,16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "building with tensorrt-rtx for 1x4x32 to 4x16x32, usually 2x8x32\n"
    report = json.loads(out)
    assert report["backend"] == "tensorrt-rtx"
    assert report["engine"] == str(tmp_path / "model.tensorrt.engine")
    rows = report["rows"]
    assert [(row["int8"], row["weight_type"]) for row in rows] == [(True, "int8")] * 12 + [(False, "fp32")] * 2
    assert [row["eligible"] for row in rows] == [True] * 12 + [False] * 2
    assert {row["chosen"] for row in rows} == {None}
    assert abs(report["engine_bytes"] - report["file_bytes"]) <= report["slack"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.tensorrt.build.log",
        "model.tensorrt.engine",
        "model.tensorrt.onnx",
    ]
    assert (tmp_path / "model.tensorrt.engine").stat().st_size > report["engine_bytes"]


def test_the_log_read_later_gives_the_same_report(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, log = built / "model.tensorrt.onnx", built / "model.tensorrt.build.log"
    assert main(["engine", str(model), "--log", str(log)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "12 of 12 sparse layers are eligible for a sparse kernel; TensorRT-RTX chooses" in out
    assert "12 of 12 int8 layers kept int8 weights" in " ".join(out.split())
    assert re.search(r"^~0\.attention\.self\.query +32x32 +2:4 +int8 +yes +on the GPU", out, re.M)
    assert "float: its weight has no Deq" in out or "its weight has no DequantizeLinear" in " ".join(out.split())


def test_expanded_weights_are_a_missed_gate(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (built / "model.tensorrt.build.log").read_text(encoding="utf-8")
    lines = [re.sub(r"(Constants: .*?)Datatype: Int8", r"\1Datatype: Float", line) if "layer.1/output/dense/M" in line
             and line.startswith("Name: /") else line for line in text.split("\n")]  # fmt: skip
    log = tmp_path / "expanded.log"
    log.write_text("\n".join(lines), encoding="utf-8")
    assert main(["engine", str(built / "model.tensorrt.onnx"), "--log", str(log)]) == 3
    out, err = capsys.readouterr()
    assert "11 of 12 int8 layers kept int8 weights" in " ".join(out.split())
    assert err.count("\n") == 1
    assert "the engine holds the weights of 1 int8 layers as fp32, bert.encoder.layer.1.output.dense first" in err


def test_the_script_runs_alone_and_its_shapes_are_taken(tmp_path: Path) -> None:
    save(encoder(layers=1), tmp_path, "m.onnx")
    inputs = {"hidden": ("batch", "sequence", 32)}
    for name, content in make_engine_files("m.onnx", inputs=inputs, batch=(1, 2, 3), sequence=(5, 6, 7)).items():
        (tmp_path / name).write_bytes(content)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "build_engine.py")],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "m.engine").stat().st_size > 0
    report = read_report(tmp_path / "m.onnx", tmp_path / "m.build.log", None)
    assert [row.weight_type for row in report.rows if row.int8] == ["int8"] * 6
    lines: list[str] = []
    build_report(tmp_path / "m.onnx", output=tmp_path / "out" / "other.engine", sequence="5,6,8", say=lines.append)
    assert lines == ["building with tensorrt-rtx for 1x5x32 to 3x8x32, usually 2x6x32"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other.build.log", "other.engine"]


HEAD = '<ir_version: 9, opset_import: ["" : 20, "of.ours" : 1]> g (float[N,16] x, float16[N,16] z) => (float[N,16] y)'
REFUSED = {
    "{ a = Relu(x) y = of.ours.Bar(a, z) }": "the ONNX parser refuses the model: node part/node_y (Bar): ",
}


@pytest.mark.parametrize("body", REFUSED)
def test_a_refusal_of_the_parser_is_one_line(body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.parser.parse_model(HEAD + body)
    for node in model.graph.node:
        node.name = f"part/node_{node.output[0]}"
    assert main(["engine", str(save(model, tmp_path)), "-q"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert REFUSED[body] in err
    assert "part/node_y" in err
    assert "its log is " in err
    assert not (tmp_path / "model.tensorrt.engine").exists()


def test_an_older_engine_survives_a_failed_build(built: Path, tmp_path: Path) -> None:
    model = save(encoder(layers=1), tmp_path)
    engine = tmp_path / "model.tensorrt.engine"
    engine.write_bytes(b"the last one")
    with pytest.raises(SqatError, match="builds no engine: Dimension mismatch for tensor hidden and profile 0"):
        build_engine(model, engine, {"hidden": [[1, 4, 31]] * 3}, backend="tensorrt-rtx", half=False)
    assert engine.read_bytes() == b"the last one"


def test_shapes_that_do_not_fit_the_model(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y)
    <float[1, 64, 16] table = {}, int64[1] zero = {0}, int64[1] one = {1}>
    { size = Shape<start = 1, end = 2>(x) part = Slice(table, zero, size, one) y = Add(x, part) }"""
    model = onnx.parser.parse_model(text.replace("table = {}", f"table = {{{', '.join(['1'] * 1024)}}}"))
    shapes = {"x": [[1, 4, 16], [1, 8, 16], [1, 65, 16]]}
    with pytest.raises(SqatError, match=r"the shapes do not fit the model: Profile kMAX .* 65 != 64") as caught:
        build_engine(save(model, tmp_path), tmp_path / "e.engine", shapes, backend="tensorrt-rtx", half=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e.engine").exists()


def test_the_same_script_builds_with_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library under its other name: all that needs no GPU is the same, reading the layers back does."""
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    model = save(encoder(layers=1), tmp_path)
    command = [sys.executable, "-m", "sqat.tensorrt.build_engine", str(model), "--backend", "tensorrt"]
    process = subprocess.run([*command, "--shapes", json.dumps(SHAPES)], capture_output=True, text=True)
    log = read_log(tmp_path / "model.tensorrt.build.log")
    assert log.weight_bytes
    assert (tmp_path / "model.tensorrt.engine").stat().st_size > log.weight_bytes
    layers = tmp_path / "model.tensorrt.layers.json"
    if process.returncode == 0:
        assert json.loads(layers.read_text())["Layers"]
    else:
        assert process.stderr.splitlines()[-1].startswith("error: the engine was built but cannot be loaded again")
        assert not layers.exists()


def test_a_library_that_crashes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nkill -SEGV $$\n")
    stub.chmod(0o755)
    monkeypatch.setattr("sqat.tensorrt.backends.sys.executable", str(stub))
    with pytest.raises(SqatError, match="signal 11") as error:
        build_engine(save(encoder(), tmp_path), tmp_path / "e.engine", SHAPES, backend="tensorrt-rtx", half=False)
    assert error.value.code == "unsupported-target"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_exported_encoders_keep_int8_weights(family: str, tmp_path: Path) -> None:
    from tests.witnesses.flavours import exported

    report = build_report(save(exported("dq", family), tmp_path), batch="1,2,4", sequence="4,8,16")
    quantized = [row for row in report.rows if row.int8]
    assert len(quantized) == {"bert": 12, "distilbert": 6}[family]
    assert {row.weight_type for row in quantized} == {"int8"}
    assert report.engine_bytes is not None
    assert abs(report.engine_bytes - report.file_bytes) <= report.slack
    report.require()
