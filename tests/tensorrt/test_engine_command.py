"""`sqat engine` at its edges: nothing here can build, a range is wrong, files do not fit."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from sqat.cli import main
from sqat.errors import SqatError
from sqat.export.engine_files import make_engine_files
from sqat.hardware.machine import Gpu
from sqat.tensorrt import backends, build_engine, command
from sqat.tensorrt.backends import choose_backend, sparse_kernel_problem
from sqat.tensorrt.command import free_inputs, holds_half, show_shapes
from tests.tensorrt.encoder import encoder

LOGS = Path(__file__).parent / "logs"
AMPERE, TURING = Gpu("NVIDIA A10", (8, 6)), Gpu("NVIDIA T4", (7, 5))
RTX_LINE = "pip install 'sqat[tensorrt-rtx]' builds ahead of time without a GPU"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.tensorrt.onnx"
    path.write_bytes(encoder().SerializeToString())
    return path


def machine(monkeypatch: pytest.MonkeyPatch, *packages: str, gpus: tuple[Gpu, ...] | OSError = ()) -> None:
    """A machine with just these of the two packages, and these GPUs."""
    real_find_spec = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name in ("tensorrt", "tensorrt_rtx"):
            return ModuleSpec(name, None, origin=name) if name in packages else None
        return real_find_spec(name, package)

    def find_gpus() -> tuple[Gpu, ...]:
        if isinstance(gpus, OSError):
            raise gpus
        return gpus

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(backends, "find_gpus", find_gpus)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command wrote, to stderr."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.mark.parametrize(
    ("option", "packages", "gpus", "backend"),
    [
        ("auto", ("tensorrt", "tensorrt_rtx"), (AMPERE,), "tensorrt"),
        ("auto", ("tensorrt", "tensorrt_rtx"), (), "tensorrt-rtx"),
        ("auto", ("tensorrt",), (AMPERE,), "tensorrt"),
        ("auto", ("tensorrt_rtx",), (AMPERE,), "tensorrt-rtx"),
        ("auto", ("tensorrt", "tensorrt_rtx"), OSError("CUDA driver error 3"), "tensorrt-rtx"),
        ("tensorrt-rtx", ("tensorrt", "tensorrt_rtx"), (AMPERE,), "tensorrt-rtx"),
        ("tensorrt", ("tensorrt", "tensorrt_rtx"), (TURING,), "tensorrt"),
    ],
)
def test_the_backend_that_builds_here(
    monkeypatch: pytest.MonkeyPatch, option: str, packages, gpus, backend: str
) -> None:
    machine(monkeypatch, *packages, gpus=gpus)
    assert choose_backend(option) == backend


NO_TENSORRT = "TensorRT is not installed (pip install tensorrt)"
NO_GPU = "TensorRT needs an NVIDIA GPU, and there is none here"
NO_DRIVER = "TensorRT needs an NVIDIA GPU, and the driver does not work (CUDA driver error 3)"
NO_RTX = "TensorRT-RTX is not installed"


@pytest.mark.parametrize(
    ("option", "packages", "gpus", "message"),
    [
        ("auto", (), (), f"{NO_TENSORRT}, and {NO_RTX}; {RTX_LINE}"),
        ("auto", ("tensorrt",), (), f"{NO_GPU}, and {NO_RTX}; {RTX_LINE}"),
        ("auto", ("tensorrt",), OSError("CUDA driver error 3"), f"{NO_DRIVER}, and {NO_RTX}; {RTX_LINE}"),
        ("tensorrt", ("tensorrt_rtx",), (AMPERE,), f"{NO_TENSORRT}; --backend tensorrt-rtx needs no GPU"),
        ("tensorrt", ("tensorrt",), (), f"{NO_GPU}; --backend tensorrt-rtx needs no GPU"),
        ("tensorrt-rtx", ("tensorrt",), (AMPERE,), f"{NO_RTX}; {RTX_LINE}"),
        ("cuda", (), (), "--backend: no backend 'cuda'; allowed: auto, tensorrt, tensorrt-rtx"),
    ],
)
def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, model: Path, capsys, option, packages, gpus, message
) -> None:
    machine(monkeypatch, *packages, gpus=gpus)
    assert main(["engine", str(model), "--backend", option]) == 2
    err = only_line(capsys)
    assert err.startswith(f"error: {message}")


def test_the_precision_beside_a_model_is_its_own(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """Another model beside the same settings has their ranges, but not their precision."""
    other = model.with_name("other.onnx")
    other.write_bytes(model.read_bytes())
    files = make_engine_files(model.name, inputs={"hidden": ("batch", "sequence", 32)}, batch=(1, 2, 4),
                        sequence=(8, 16, 32), precision="fp16")  # fmt: skip
    model.with_name("build_engine.json").write_bytes(files["build_engine.json"])
    calls: list[dict[str, object]] = []

    def stop(*arguments: object, **options: object) -> None:
        calls.append({"shapes": arguments[2], **options})
        raise SqatError("stop", code="usage")

    machine(monkeypatch, "tensorrt_rtx")
    monkeypatch.setattr(command, "build_engine", stop)
    shapes = {"hidden": ([1, 8, 32], [2, 16, 32], [4, 32, 32])}
    for path, half in ((model, True), (other, False)):
        with pytest.raises(SqatError):
            command.build_report(path)
        assert calls.pop() == {"shapes": shapes, "backend": "tensorrt-rtx", "half": half}


def test_gpus_without_sparse_kernels() -> None:
    assert (
        sparse_kernel_problem((TURING,))
        == "NVIDIA T4 has no sparse tensor cores, which came with compute capability 8.0"
    )
    assert sparse_kernel_problem((TURING, AMPERE)) == ""
    assert sparse_kernel_problem(()) == ""


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch=8,1,32", "--batch: needs three ascending sizes from 1 on, got 8,1,32"),
        ("--batch=8", "--batch: needs smallest,usual,largest such as 1,8,32, got '8'"),
        ("--sequence=a,b,c", "--sequence: needs smallest,usual,largest such as 1,8,32, got 'a,b,c'"),
        ("--sequence=0,1,2", "--sequence: needs three ascending sizes"),
    ],
)
def test_a_wrong_range_is_one_line(model: Path, capsys, option: str, message: str) -> None:
    assert main(["engine", str(model), option]) == 2
    err = only_line(capsys)
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("packages", [(), ("tensorrt_rtx",)])
def test_a_cpu_sparse_file_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, packages: tuple[str, ...]
) -> None:
    machine(monkeypatch, *packages)
    path = tmp_path / "model.cpu-sparse.onnx"
    proto = encoder()
    proto.opset_import.add(domain="sqat", version=1)
    path.write_bytes(proto.SerializeToString())
    for more in ([], [f"--log={LOGS / 'trtexec-10.log'}"]):
        assert main(["engine", str(path), *more]) == 2
        err = only_line(capsys)
        assert err.startswith(f"error: {path}: is of target cpu-sparse")
    assert not list(tmp_path.glob("*.engine"))


def test_files_that_do_not_fit_are_one_line(model: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"# no model\n")
    cases = [
        (tmp_path / "absent.onnx", LOGS / "trtexec-10.log", "no such file or folder"),
        (broken, LOGS / "trtexec-10.log", "not an ONNX file, or cut short"),
        (model, tmp_path / "absent.log", "no such file"),
        (model, LOGS / "trtexec-8.log", "the log names none of its layers"),
    ]
    for path, log, message in cases:
        assert main(["engine", str(path), "--log", str(log)]) == 2
        err = only_line(capsys)
        assert message in err


def test_options_of_a_build_are_refused_where_nothing_is_built(model: Path, capsys) -> None:
    assert main(["engine", str(model), "--log", str(LOGS / "trtexec-10.log"), "--batch", "1,2,3"]) == 2
    assert "--log" in only_line(capsys)


def test_the_model_is_not_written_over(model: Path, capsys) -> None:
    before = model.read_bytes()
    assert main(["engine", str(model), "--output", str(model)]) == 2
    assert capsys.readouterr().err == "error: --output: the engine would be written over the model\n"
    assert model.read_bytes() == before


def test_the_table_of_a_log(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    log, layers = str(LOGS / "trtexec-10.log"), str(LOGS / "inspector-11.json")
    assert main(["engine", str(model), "--log", log, "--layers", layers]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert [line.split() for line in lines if line.startswith("~1.intermediate.dense")] == [
        ["~1.intermediate.dense", "64x32", "2:4", "int8", "yes", "no", "a"]
    ]
    assert "a: a dense kernel was faster (4 of 14 layers)" in lines
    assert lines[-1] == "8 of 12 sparse layers chose a sparse kernel"


def test_layer_information_is_enough_beside_a_silent_log(model: Path, tmp_path: Path, capsys) -> None:
    log = tmp_path / "build.log"
    log.write_text("[I] [TRT] Engine generation completed in 7.1 seconds.\n")
    assert main(["engine", str(model), "--log", str(log)]) == 2
    assert main(["engine", str(model), "--log", str(log), "--layers", str(LOGS / "inspector-11.json")]) == 0
    assert "7 of 12 sparse layers chose a sparse kernel" in capsys.readouterr().out


def test_no_sparse_kernel_ends_with_3_after_the_table(model: Path, capsys) -> None:
    assert main(["engine", str(model), "--log", str(LOGS / "trtexec-10-counts.log")]) == 3
    out, err = capsys.readouterr()
    assert "0 of 12 sparse layers chose a sparse kernel" in out
    assert err == f"error: {model}: TensorRT chose no sparse kernel; a dense kernel was faster\n"


def test_json_of_a_log(model: Path, capsys) -> None:
    assert main(["engine", str(model), "--layers", str(LOGS / "inspector-11.json"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["engine"], content["log"], content["backend"], content["chosen"]) == (None, None, "tensorrt", 7)
    assert content["summary"] == "7 of 12 sparse layers chose a sparse kernel"
    assert content["rows"][0]["kernel"].startswith("sm80_xmma_sparse_gemm")


def test_shapes_and_precision_of_a_model() -> None:
    model = encoder(layers=1)
    assert free_inputs(model) == {"hidden": ("batch", "sequence", 32)}
    assert not holds_half(model)
    assert show_shapes({}) == "its fixed shapes"
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_param")
    assert free_inputs(model) == {"hidden": ("batch", "?", 32)}


def test_errors_name_the_place() -> None:
    with pytest.raises(SqatError) as error:
        choose_backend("cuda")
    assert (error.value.code, error.value.place, error.value.exit_code) == ("unknown-name", "--backend", 2)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "is a folder"),
        ("..", "is a folder"),
        ("folder", "is a folder"),
        ("folder/", "is a folder"),
        ("/", "is a folder"),
        ("", "is a folder"),
        ("file/a.engine", "is a file"),
        ("file/b/a.engine", "file"),
        ("other.onnx", "is the name of a model"),
        ("model.tensorrt.onnx", "over the model"),
        ("folder/../model.tensorrt.onnx", "over the model"),
        ("link.engine", "over the model"),
        ("hard.engine", "over the model"),
        ("pipe", "is no regular file"),
        ("a" * 300, "cannot be written"),
    ],
)
def test_an_output_that_is_no_place_for_an_engine(
    output: str, words: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    Path("folder").mkdir()
    Path("file").write_text("")
    Path("link.engine").symlink_to(model)
    Path("hard.engine").hardlink_to(model)
    os.mkfifo("pipe")
    before, content = sorted(Path().iterdir()), model.read_bytes()
    assert main(["engine", model.name, "--output", output]) == 2
    assert words in only_line(capsys)
    assert (sorted(Path().iterdir()), model.read_bytes()) == (before, content)


def test_a_module_that_is_not_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in build_engine.MODULES.values():
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "tensorrt.py").write_text("Builder = None\n")
    with pytest.raises(build_engine.BuildError, match="is not NVIDIA's"):
        build_engine.import_library("tensorrt")
    (tmp_path / "tensorrt.py").unlink()
    (tmp_path / "tensorrt").mkdir()
    importlib.invalidate_caches()
    sys.modules.pop("tensorrt", None)
    with pytest.raises(build_engine.BuildError, match="not installed"):
        build_engine.import_library("tensorrt")
