"""The files beside an exported model: settings, a trtexec script and a Python builder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.export.engine_files import BuildSettings, make_engine_files, parse_range, profile_shapes, read_settings
from tests.errors import raises_code

TOKENS = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
BATCH, SEQUENCE = (1, 8, 32), (16, 128, 256)
STUB = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done
exit ${STATUS:-0}
"""
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def files_for(name: str = "m.onnx", inputs=TOKENS, **options) -> dict[str, bytes]:
    return make_engine_files(name, inputs=inputs, **{"batch": BATCH, "sequence": SEQUENCE, **options})


def settings_in(files: dict[str, bytes]) -> dict[str, object]:
    return json.loads(files["build_engine.json"])


def run_script(folder: Path, files: dict[str, bytes], status: int = 0) -> tuple[int, list[str]]:
    """Run the script with a program in trtexec's place that prints its arguments."""
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    (folder / "build_engine.sh").write_bytes(files["build_engine.sh"])
    environment = {**os.environ, "TRTEXEC": str(folder / "stub"), "STATUS": str(status)}
    command = ["bash", str(folder / "build_engine.sh")]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    return process.returncode, process.stdout.splitlines()


@needs_bash
def test_arguments_of_trtexec(tmp_path: Path) -> None:
    code, arguments = run_script(tmp_path, files_for("model.tensorrt.onnx"))
    assert code == 0
    assert arguments == [
        "--onnx=model.tensorrt.onnx",
        "--saveEngine=model.tensorrt.engine",
        "--sparsity=enable",
        "--stronglyTyped",
        "--minShapes=input_ids:1x16,attention_mask:1x16",
        "--optShapes=input_ids:8x128,attention_mask:8x128",
        "--maxShapes=input_ids:32x256,attention_mask:32x256",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=model.tensorrt.layers.json",
        "--verbose",
        "--skipInference",
    ]
    assert (tmp_path / "model.tensorrt.build.log").read_text().splitlines() == arguments


@needs_bash
def test_names_with_blanks_and_a_build_that_fails(tmp_path: Path) -> None:
    files = files_for("my model.onnx", {"the ids": ("batch", "sequence")})
    code, arguments = run_script(tmp_path, files, status=3)
    assert code == 3, "tee must not hide the status"
    assert arguments[0] == "--onnx=my model.onnx"
    assert "--minShapes=the ids:1x16" in arguments
    assert (tmp_path / "my model.build.log").exists()


@pytest.mark.parametrize(("precision", "types"), [("fp32", ["--int8"]), ("fp16", ["--int8", "--fp16"])])
def test_the_flavour_for_tensorrt_8_is_weakly_typed(precision: str, types: list[str]) -> None:
    files = files_for(precision=precision, layers="conv1x1", weights="qdq")
    words = files["build_engine.sh"].decode().split()
    assert [word for word in words if word in ("--int8", "--fp16", "--stronglyTyped")] == types
    assert "--buildOnly" in words
    assert "--skipInference" not in words


@pytest.mark.parametrize(("layers", "weights"), [("conv1x1", "dq"), ("matmul", "qdq")])
def test_other_flavours_are_strongly_typed(layers: str, weights: str) -> None:
    assert "--stronglyTyped" in files_for(layers=layers, weights=weights)["build_engine.sh"].decode()


def test_settings_name_the_model_and_its_shapes() -> None:
    assert settings_in(files_for("a'b.onnx")) == {
        "file": "a'b.onnx",
        "inputs": {name: [[1, 16], [8, 128], [32, 256]] for name in TOKENS},
        "batch_range": [1, 8, 32],
        "sequence_range": [16, 128, 256],
        "precision": "fp32",
        "layers": "matmul",
        "weights": "dq",
    }


def test_images_have_only_a_batch_and_fixed_inputs_no_profile() -> None:
    files = files_for("vit.onnx", {"pixel_values": ("batch", 3, 224, 224), "scale": (1, 1)})
    assert settings_in(files)["inputs"] == {"pixel_values": [[size, 3, 224, 224] for size in BATCH]}
    fixed = files_for("m.onnx", {"x": (1, 128)})
    assert "Shapes" not in fixed["build_engine.sh"].decode()
    assert settings_in(fixed)["inputs"] == {}


@pytest.mark.parametrize(
    "sizes", [("batch", 3, "height", "width"), (8, 3, 224, "width"), ("batch", "sequence", "depth")]
)
def test_other_free_sizes_are_refused(sizes: tuple[int | str, ...]) -> None:
    with pytest.raises(SqatError, match=r"free size '(height|width|depth)'") as error:
        profile_shapes({"x": sizes}, BATCH, SEQUENCE)
    assert error.value.code == "unsupported-model"


@pytest.mark.parametrize(
    "text", ["", "1", "1,8", "1,8,32,64", "1,8,x", "8,1,32", "0,1,2", "1,8,4", "-1,1,1", "1.5,2,3"]
)
def test_wrong_ranges_are_refused(text: str) -> None:
    with pytest.raises(SqatError) as error:
        parse_range(text, "--batch")
    assert (error.value.code, error.value.place) == ("usage", "--batch")


RANGES = st.lists(st.integers(1, 9999), min_size=3, max_size=3).map(sorted).map(tuple)


@given(RANGES)
def test_ranges_are_parsed(sizes: tuple[int, int, int]) -> None:
    assert parse_range(" , ".join(str(size) for size in sizes), "--batch") == sizes


@given(RANGES, RANGES)
def test_settings_are_read_back(tmp_path_factory: pytest.TempPathFactory, batch, sequence) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = files_for(batch=batch, sequence=sequence, precision="fp16", layers="conv1x1", weights="qdq")
    (folder / "build_engine.json").write_bytes(files["build_engine.json"])
    shapes = profile_shapes(TOKENS, batch, sequence)
    expected = BuildSettings(file="m.onnx", inputs=shapes, batch_range=batch, sequence_range=sequence,
                             precision="fp16", layers="conv1x1", weights="qdq")  # fmt: skip
    assert read_settings(folder / "m.onnx") == expected


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"file": "m.onnx"}', '{"inputs": 3}'])
def test_damaged_settings_are_refused(tmp_path: Path, text: str) -> None:
    assert read_settings(tmp_path / "m.onnx") is None
    (tmp_path / "build_engine.json").write_text(text)
    with pytest.raises(SqatError) as error:
        read_settings(tmp_path / "m.onnx")
    assert error.value.code == "unreadable-file"


def test_settings_that_are_no_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "build_engine.json")
    with raises_code("unreadable-file", "is a pipe"):
        read_settings(tmp_path / "m.onnx")


def test_the_script_needs_only_the_standard_library() -> None:
    tree = ast.parse(files_for()["build_engine.py"])
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(("text", "message"), [(None, "name a model"), ("{", "is not JSON"), ("[]", "no object")])
def test_the_script_says_what_is_wrong_with_its_settings(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "build_engine.py").write_bytes(files_for()["build_engine.py"])
    if text is not None:
        (tmp_path / "build_engine.json").write_text(text)
    process = subprocess.run([sys.executable, "-I", tmp_path / "build_engine.py"], capture_output=True, text=True)
    assert process.returncode in (1, 2)
    assert message in process.stderr
    assert "Traceback" not in process.stderr
