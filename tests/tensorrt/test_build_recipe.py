"""The files that go beside an exported model: a trtexec script and a Python builder."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.errors import SqatError
from sqat.export.build_recipe import build_files, parse_range, profile_shapes, written_half, written_ranges

TOKENS = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
BATCH, SEQUENCE = (1, 8, 32), (16, 128, 256)
STUB = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done
exit ${STATUS:-0}
"""


def run_script(folder: Path, files: dict[str, bytes], status: int = 0) -> tuple[int, list[str]]:
    """Run the script with a program in trtexec's place that prints what it was given."""
    (folder / "stub").write_text(STUB)
    (folder / "stub").chmod(0o755)
    (folder / "build_engine.sh").write_bytes(files["build_engine.sh"])
    done = subprocess.run(
        ["bash", str(folder / "build_engine.sh")],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "TRTEXEC": str(folder / "stub"), "STATUS": str(status)},
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_what_trtexec_is_given(tmp_path: Path) -> None:
    code, given_to = run_script(
        tmp_path, build_files("model.tensorrt.onnx", inputs=TOKENS, batch=BATCH, sequence=SEQUENCE)
    )
    assert code == 0
    assert given_to == [
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
    assert (tmp_path / "model.tensorrt.build.log").read_text().splitlines() == given_to


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_names_with_blanks_and_a_build_that_fails(tmp_path: Path) -> None:
    files = build_files("my model.onnx", inputs={"the ids": ("batch", "sequence")}, batch=BATCH, sequence=SEQUENCE)
    code, given_to = run_script(tmp_path, files, status=3)
    assert code == 3, "tee must not hide the status"
    assert given_to[0] == "--onnx=my model.onnx"
    assert "--minShapes=the ids:1x16" in given_to
    assert (tmp_path / "my model.build.log").exists()


@pytest.mark.parametrize(("precision", "types"), [("fp32", ["--int8"]), ("fp16", ["--int8", "--fp16"])])
def test_the_flavour_for_tensorrt_8_is_weakly_typed(precision, types: list[str]) -> None:
    files = build_files("m.onnx", inputs=TOKENS, batch=BATCH, sequence=SEQUENCE, precision=precision, layers="conv1x1",
                        weights="qdq")  # fmt: skip
    words = files["build_engine.sh"].decode().split()
    assert [word for word in words if word in ("--int8", "--fp16", "--stronglyTyped")] == types
    assert "--buildOnly" in words
    assert "--skipInference" not in words
    assert settings_of(files)["PRECISIONS"] == [word.strip("-").upper() for word in types]


@pytest.mark.parametrize(("layers", "weights"), [("conv1x1", "dq"), ("matmul", "qdq")])
def test_all_other_flavours_carry_their_types(layers, weights) -> None:
    files = build_files("m.onnx", inputs=TOKENS, batch=BATCH, sequence=SEQUENCE, layers=layers, weights=weights)
    assert "--stronglyTyped" in files["build_engine.sh"].decode()


def settings_of(files: dict[str, bytes]) -> dict[str, object]:
    """The settings in the script, read by Python itself."""
    lines = ast.parse(files["build_engine.py"]).body
    named = {line.target.id: line.value for line in lines if isinstance(line, ast.AnnAssign)}
    return {name: ast.literal_eval(value) for name, value in named.items()}


def test_the_script_knows_its_model() -> None:
    settings = settings_of(build_files("a'b.onnx", inputs=TOKENS, batch=BATCH, sequence=SEQUENCE))
    assert settings == {
        "MODEL": "a'b.onnx",
        "SHAPES": {name: [[1, 16], [8, 128], [32, 256]] for name in TOKENS},
        "PRECISIONS": ["INT8"],
    }


def test_images_have_only_a_batch_and_fixed_inputs_no_profile() -> None:
    inputs = {"pixel_values": ("batch", 3, 224, 224), "scale": (1, 1)}
    files = build_files("vit.onnx", inputs=inputs, batch=BATCH, sequence=SEQUENCE)
    assert settings_of(files)["SHAPES"] == {"pixel_values": [[1, 3, 224, 224], [8, 3, 224, 224], [32, 3, 224, 224]]}
    fixed = build_files("m.onnx", inputs={"x": (1, 128)}, batch=BATCH, sequence=SEQUENCE)
    assert "Shapes" not in fixed["build_engine.sh"].decode()
    assert settings_of(fixed)["SHAPES"] == {}


@pytest.mark.parametrize(
    "sizes", [("batch", 3, "height", "width"), (8, 3, 224, "width"), ("batch", "sequence", "depth")]
)
def test_other_free_sizes_are_refused(sizes: tuple[int | str, ...]) -> None:
    with pytest.raises(
        SqatError, match=r"input x has a free size '(height|width|depth)'; only batch and sequence may be"
    ):
        profile_shapes({"x": sizes}, BATCH, SEQUENCE)


@pytest.mark.parametrize(
    "text", ["", "1", "1,8", "1,8,32,64", "1,8,x", "8,1,32", "0,1,2", "1,8,4", "-1,1,1", "1.5,2,3"]
)
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(SqatError, match=r"^--batch: needs (three sizes|smallest,usual,largest)") as caught:
        parse_range(text, "--batch")
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 9999), min_size=3, max_size=3).map(sorted))
def test_ranges_that_are_some(sizes: list[int]) -> None:
    assert parse_range(" , ".join(str(size) for size in sizes), "--batch") == tuple(sizes)


@given(
    st.lists(st.integers(1, 9999), min_size=3, max_size=3).map(sorted).map(tuple),
    st.lists(st.integers(1, 9999), min_size=3, max_size=3).map(sorted).map(tuple),
)
def test_ranges_are_read_back_from_the_script(tmp_path_factory: pytest.TempPathFactory, batch, sequence) -> None:
    folder = tmp_path_factory.getbasetemp()
    files = build_files("m.onnx", inputs=TOKENS, batch=batch, sequence=sequence)
    (folder / "build_engine.py").write_bytes(files["build_engine.py"])
    assert written_ranges(folder / "m.onnx") == {"batch": batch, "sequence": sequence}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# another script\n",
        "SHAPES: dict = shapes()\n",
        "SHAPES: dict = {}\n",
        "SHAPES: dict = {'x': 3}\n",
        "SHAPES: dict = {'x': [[1], ['a'], [2]]}\n",
        "SHAPES: dict = {'x':\n",
    ],
)
def test_a_script_that_was_changed_is_let_be(tmp_path: Path, text: str) -> None:
    assert written_ranges(tmp_path / "m.onnx") == {}
    (tmp_path / "build_engine.py").write_text(
        f"# Settings, as `sqat export` writes them.\n{text}# End of the settings.\n" if text else text
    )
    assert written_ranges(tmp_path / "m.onnx") == {}


def test_the_script_needs_nothing_of_ours() -> None:
    tree = ast.parse(build_files("m.onnx", inputs=TOKENS, batch=BATCH, sequence=SEQUENCE)["build_engine.py"])
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_the_precision_beside_a_model_is_that_models_own(tmp_path: Path) -> None:
    files = build_files("model.tensorrt.onnx", inputs={"input_ids": ("batch", "sequence")}, batch=(1, 2, 4),
                        sequence=(8, 16, 32), precision="fp16", layers="conv1x1", weights="qdq")  # fmt: skip
    assert written_half(tmp_path / "model.tensorrt.onnx") is None
    (tmp_path / "build_engine.py").write_bytes(files["build_engine.py"])
    assert written_half(tmp_path / "model.tensorrt.onnx") is True
    assert written_half(tmp_path / "model.fp16.onnx") is None
    plain = build_files(
        "model.tensorrt.onnx", inputs={"input_ids": ("batch", "sequence")}, batch=(1, 2, 4), sequence=(8, 16, 32)
    )
    (tmp_path / "build_engine.py").write_bytes(plain["build_engine.py"])
    assert written_half(tmp_path / "model.tensorrt.onnx") is False
    assert written_ranges(tmp_path / "other.onnx") == {"batch": (1, 2, 4), "sequence": (8, 16, 32)}
    (tmp_path / "build_engine.py").write_text("PRECISIONS: list[str] = something()")
    assert written_half(tmp_path / "model.tensorrt.onnx") is None
