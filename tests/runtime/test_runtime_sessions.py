"""Sessions as users open them: threads, several at a time, other processes; and what malformed nodes say."""

from __future__ import annotations

import ctypes
import ctypes.util
import multiprocessing
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sqat import runtime
from sqat.errors import SqatError
from tests.runtime.nodes import Linear, available, needs_library, random_linear
from tests.runtime.test_runtime_attention import node as attention_node
from tests.runtime.test_runtime_attention import random_text


def test_a_missing_library_has_an_install_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "LIBRARY", tmp_path / "none.so")
    for system, machine, hint in (
        ("Linux", "x86_64", r"install g\+\+ and `CC=gcc CXX=g\+\+ pip install --force-reinstall --no-deps sqat`"),
        ("Linux", "aarch64", r"install g\+\+ and `CC=gcc"),
        ("Linux", "riscv64", "it is built on Linux .* only; files of target onnx-int8 run anywhere"),
        ("Darwin", "x86_64", "it is built on Linux .* only; files of target onnx-int8 run anywhere"),
    ):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        with pytest.raises(SqatError, match=f"has no compiled runtime; {hint}"):
            runtime.library()


@pytest.mark.skipif(platform.system() != "Linux" or shutil.which("g++") is None, reason="nothing to compile with")
def test_where_there_is_a_compiler_there_is_the_library() -> None:
    """All others are skipped without it: here a compilation that failed is seen."""
    assert runtime.instruction_set() in ("avx512_vnni", "avx2", "scalar")


def test_a_library_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libsqat_runtime.so"
    monkeypatch.setattr(runtime, "LIBRARY", broken)
    for content in (b"", b"\x7fELF", b"no library at all" * 400):
        broken.write_bytes(content)
        with pytest.raises(SqatError) as error:
            runtime.session(tmp_path / "any.onnx")
        assert (error.value.code, error.value.place) == ("missing-package", str(broken))
        assert str(error.value).count(str(broken)) == 1
        assert available() == []
    broken.unlink()
    other = ctypes.util.find_library("m")
    if other is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda path, load=ctypes.CDLL: load(other))
        broken.touch()
        with pytest.raises(SqatError, match="undefined symbol: SqatInstructionSet"):
            runtime.instruction_set()


@needs_library
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.99])
def test_a_truncated_library_is_an_error(part: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A loader that reads behind the end of the file would end the process."""
    content = runtime.library().read_bytes()
    (tmp_path / "cut.so").write_bytes(content[: int(len(content) * part)])
    monkeypatch.setattr(runtime, "LIBRARY", tmp_path / "cut.so")
    with pytest.raises(SqatError, match="truncated") as error:
        runtime.instruction_set()
    assert error.value.code == "missing-package"


@needs_library
@pytest.mark.parametrize("name", available())
def test_an_instruction_set_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQAT_RUNTIME_ISA", name)
    assert runtime.instruction_set() == name


@needs_library
def test_unknown_and_missing_instruction_sets_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SQAT_RUNTIME_ISA", "sse9")
    with pytest.raises(SqatError, match="SQAT_RUNTIME_ISA=sse9") as error:
        runtime.session(tmp_path / "any.onnx")
    assert error.value.code == "missing-hardware"
    if "avx512_vnni" not in available():
        monkeypatch.setenv("SQAT_RUNTIME_ISA", "avx512_vnni")
        with pytest.raises(SqatError, match="this processor lacks it"):
            runtime.instruction_set()


@needs_library
def test_a_session_of_a_file(tmp_path: Path) -> None:
    linear = random_linear(1, (4, 32), 16)
    onnx.save(linear.node("Y").model(), tmp_path / "one.onnx")
    session = runtime.session(tmp_path / "one.onnx", threads=1)
    np.testing.assert_array_equal(session.run(None, {"X": linear.x})[0], linear.y)


@needs_library
def test_options_serve_several_sessions(tmp_path: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    first, second = random_linear(1, (4, 32), 16), random_linear(2, (4, 48), 20)
    for name, linear in (("first", first), ("second", second)):
        onnx.save(linear.node("Y").model(), tmp_path / f"{name}.onnx")
    sessions = [runtime.session(tmp_path / f"{name}.onnx", options) for name in ("first", "second")]
    for session, linear in zip(sessions, (first, second), strict=True):
        np.testing.assert_array_equal(session.run(None, {"X": linear.x})[0], linear.y)


@needs_library
def test_options_may_have_the_ops_already(tmp_path: Path) -> None:
    import onnxruntime

    linear = random_linear(1, (4, 32), 16)
    onnx.save(linear.node("Y").model(), tmp_path / "one.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(runtime.library()))
    sessions = [runtime.session(tmp_path / "one.onnx", options) for _ in range(2)]
    sessions.append(onnxruntime.InferenceSession(tmp_path / "one.onnx", options))
    for session in sessions:
        np.testing.assert_array_equal(session.run(None, {"X": linear.x})[0], linear.y)
    options.register_custom_ops_library(str(runtime.library()))
    with pytest.raises(SqatError) as error:
        runtime.session(tmp_path / "one.onnx", options)
    assert error.value.code == "usage"


@needs_library
def test_a_file_that_cannot_be_opened_registers_nothing(tmp_path: Path) -> None:
    import onnxruntime

    linear = random_linear(1, (4, 32), 16)
    onnx.save(linear.node("Y").model(), tmp_path / "one.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(runtime.library()))
    with pytest.raises(Exception, match=r"absent\.onnx"):
        runtime.session(tmp_path / "absent.onnx", options)
    np.testing.assert_array_equal(
        runtime.session(tmp_path / "one.onnx", options).run(None, {"X": linear.x})[0], linear.y
    )


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_clients_of_one_session_get_identical_answers(threads: int) -> None:
    node = random_linear(3, (70, 96), 80, norm=True, activation="gelu", y_scale=0.05).node()
    heads = attention_node(*random_text(3, 3, 40, 4, 32, 0.8), 4)
    work = [(each.session(threads=threads), each.feeds(), each.run("scalar")) for each in (node, heads)]

    def client(number: int) -> None:
        for turn in range(40):
            session, feeds, expected = work[(number + turn) % 2]
            for got, want in zip(session.run(None, feeds), expected, strict=True):
                np.testing.assert_array_equal(got, want)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


def answer_in_child(linear: Linear) -> Any:
    return linear.node("Y").run(threads=2)[0]


@needs_library
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_sessions_opened_in_other_processes(method: str) -> None:
    """A forked process opens its own session: ONNX Runtime's threads, like all threads, do not survive a fork."""
    linear = random_linear(4, (64, 64), 32)
    if method == "spawn":
        linear.node("Y").run(threads=2)  # of the parent, in use before the child starts
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(answer_in_child, (linear,)), linear.y)


@needs_library
@pytest.mark.parametrize(
    ("newest", "problem"),
    [
        (1, "sqat needs ONNX Runtime 1.17 or later, this is 1.16.3"),
        (17, "sqat's library serves another ONNX Runtime of this"),
    ],
)
def test_another_onnx_runtime_is_refused_and_sessions_go_on(newest: int, problem: str) -> None:
    """RegisterCustomOps of a base that has too old a version, or is not the first of the process."""
    node = LINEAR.node()
    live, expected = node.session(), node.run()
    message = ctypes.c_char_p()

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(_code: int, text: bytes) -> int:
        message.value = text
        return 1

    table = (ctypes.c_void_p * 300)(ctypes.cast(create_status, ctypes.c_void_p).value)

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(version: int) -> int | None:
        return ctypes.addressof(table) if version <= newest else None

    @ctypes.CFUNCTYPE(ctypes.c_void_p)
    def get_version() -> int | None:
        return ctypes.cast(ctypes.c_char_p(b"1.16.3"), ctypes.c_void_p).value

    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p).value, ctypes.cast(get_version, ctypes.c_void_p).value
    )
    register = ctypes.CDLL(str(runtime.library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert message.value is not None
    assert message.value.startswith(problem.encode())
    fed = {name: value for name, value in node.fed.items() if value is not None}
    for got, want in zip(live.run(None, fed), expected, strict=True):
        np.testing.assert_array_equal(got, want)


LINEAR = random_linear(5, (4, 40), 24, norm=True, y_scale=0.1)
STEPPED = replace(random_linear(5, (4, 40), 24), steps=np.full(24, 0.1, np.float32))


@needs_library
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"values": None}, "input 1 is marked single but has an empty string"),
        (
            {"values": np.zeros((2, 6), np.int8)},
            r"values has shape \[2,6\], expected \[2,inputs/8,64\] for 24 ",
        ),
        ({"values": np.zeros((3, 6, 64), np.int8)}, r"values has shape \[3,6,64\], expected \[2,inputs/8,64\]"),
        ({"values": np.zeros((2, 5, 64), np.int8)}, "values is for 40 inputs, expected a multiple of 16"),
        ({"positions": np.zeros((2, 4, 64), np.uint8)}, r"positions has shape \[2,4,64\], expected \[2,3,64\]"),
        ({"positions": np.full((2, 3, 64), 8, np.uint8)}, "positions has a position above 7"),
        ({"positions": np.zeros((2, 3, 64), np.uint8)}, "positions has a position twice in a group"),
        ({"scale": np.zeros((2, 12), np.float32)}, r"scale has shape \[2,12\], expected one scale per channel"),
        ({"scale": np.zeros(40, np.float32)}, r"bias has shape \[24\], expected \[40\]"),
        ({"bias": np.zeros(23, np.float32)}, r"bias has shape \[23\], expected \[24\]"),
        ({"gamma": None}, "gamma is missing, LayerNorm needs gamma and beta"),
        ({"beta": None}, "beta is missing, LayerNorm needs gamma and beta"),
        ({"gamma": np.zeros(25, np.float32)}, r"gamma has shape \[25\], expected \[24\]"),
        ({"steps": np.ones(24, np.float32)}, "steps are given beside a LayerNorm"),
        ({"steps": np.ones(25, np.float32), "gamma": None, "beta": None}, r"steps has shape \[25\], expected \[24\]"),
        ({"steps": np.zeros(24, np.float32), "gamma": None, "beta": None}, "steps is 0.0+, expected a positive"),
    ],
)
def test_malformed_weights(change: dict[str, Any], problem: str) -> None:
    node = LINEAR.node()
    with pytest.raises(Exception, match=problem):
        replace(node, constants={**node.constants, **change}).session()


@needs_library
@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"activation": "swish"}, "activation is 'swish', expected none, gelu, gelu_tanh or relu"),
        ({"activation": 3}, "activation"),
        ({"y_scale": 0.0}, "y_scale is 0.0+, expected a positive finite number"),
        ({"y_scale": float("nan")}, "y_scale is -?nan, expected"),
        ({"y_scale": 1e-40}, "y_scale is 0.0+, expected a positive finite number with a finite inverse"),
        ({"y_scale": 1}, "y_scale has another type"),
        ({"epsilon": -1.0}, "epsilon is no small number"),
    ],
)
def test_malformed_attributes(attributes: dict[str, Any], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        replace(LINEAR.node(), attributes=attributes).session()


@needs_library
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"X": np.ones((4, 64), np.uint8)}, r"X has shape \[4,64\], but the weights are for up to 48 inputs"),
        ({"X": np.ones((), np.uint8)}, r"X has shape \[\], but"),
        ({"residual": np.ones((4, 25), np.float32)}, r"residual has shape \[4,25\], expected \[4,24\]"),
        ({"residual": np.ones((2, 2, 24), np.float32)}, r"residual has shape \[2,2,24\], expected \[4,24\]"),
        ({"mask": np.ones(5, np.int64)}, r"mask has shape \[5\], expected \[4\]"),
        ({"mask": np.ones((4, 40), np.int64)}, r"mask has shape \[4,40\], expected \[4\]"),
        ({"X": np.ones(40, np.uint8), "residual": None, "mask": np.ones((), np.int64)}, "mask is given for one row"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], problem: str) -> None:
    node = LINEAR.node()
    with pytest.raises(Exception, match=problem):
        replace(node, fed={**node.fed, **change}).run()


@needs_library
@pytest.mark.parametrize(
    ("fed", "problem"),
    [
        (("values",), "is missing"),
        (("scale",), "is missing"),
        (("gamma",), "is missing"),
        (("gamma", "beta"), "gamma is computed, expected an initializer"),
        (("steps",), "steps is computed, expected an initializer"),
        (("positions",), "values is for 24 inputs, expected a multiple of 16"),
    ],
)
def test_weights_that_are_inputs_are_refused(fed: tuple[str, ...], problem: str) -> None:
    linear = LINEAR if fed != ("steps",) else STEPPED
    node = linear.node()
    constants = {name: value for name, value in node.constants.items() if name not in fed}
    model = replace(node, constants=constants, fed={**node.fed, **{name: node.constants[name] for name in fed}})
    with pytest.raises(Exception, match=problem):
        model.run()


@needs_library
def test_a_residual_beside_steps_of_each_channel() -> None:
    node = STEPPED.node()
    residual = np.zeros((4, 24), np.float32)
    with pytest.raises(Exception, match="residual is given beside steps of each channel"):
        replace(node, fed={**node.fed, "residual": residual}).run()


@needs_library
@pytest.mark.parametrize(
    ("attributes", "qkv", "mask", "problem"),
    [
        ({"heads": 0}, (1, 4, 48), (1, 4), "heads is 0, expected 1 or more"),
        ({"score_scale": 0.0}, (1, 4, 48), (1, 4), "score_scale is 0.0+, expected a positive"),
        ({"value_scale": float("inf")}, (1, 4, 48), (1, 4), "value_scale is inf, expected"),
        ({"y_scale": 0.0}, (1, 4, 48), (1, 4), "y_scale is 0.0+, expected"),
        ({"heads": 5}, (1, 4, 48), (1, 4), r"QKV has shape \[1,4,48\], expected .* 5 heads"),
        ({"heads": 6148914691236517205}, (1, 4, 48), (1, 4), r"QKV has shape \[1,4,48\], expected"),
        ({}, (1, 65537, 6), (1, 65537), r"QKV has shape \[1,65537,6\], expected up to 65536 tokens"),
        ({}, (4, 48), (1, 4), r"QKV has shape \[4,48\], expected \[texts,tokens,3\*width\]"),
        ({}, (1, 4, 48), (1, 5), r"mask has shape \[1,5\], expected \[1,4\]"),
    ],
)
def test_malformed_attention(attributes: dict[str, Any], qkv: Any, mask: Any, problem: str) -> None:
    node = attention_node(np.ones(qkv, np.uint8), np.ones(mask, np.int64), **{"heads": 2, **attributes})
    with pytest.raises(Exception, match=problem):
        node.run()
