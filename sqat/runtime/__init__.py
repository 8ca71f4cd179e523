"""Serving int8 encoders with 2:4 weights on ordinary CPUs: the custom ops and sessions that have them.

What: `session` opens an ONNX file of the target ``cpu-sparse`` as an ordinary `onnxruntime.InferenceSession`;
`library` is the shared library of the ops, for C, C++, C# and Java; `instruction_set` is what it would use here.

Why a library of custom ops: ONNX Runtime keeps threads, memory and the API its users know, and needs one
registration line. The sources are in ``source/``; they are compiled when sqat is installed, if there is a compiler.
The library has the elementwise passes of training too (`sqat.runtime.kernels`). Left out: graphs of other export
targets, which `onnxruntime` runs alone.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqat.errors import SqatError

if TYPE_CHECKING:
    import onnxruntime

LIBRARY = Path(__file__).with_name("libsqat_runtime.so")
# Options that have the ops: ONNX Runtime refuses a domain it was given before.
_REGISTERED: WeakSet[onnxruntime.SessionOptions] = WeakSet()
# What ONNX Runtime says of a session whose options lack the ops, and of one whose options have them twice.
LACKING, TWICE = "is not a registered function/op", "Domain already set in registry"


def library() -> Path:
    """The shared library; SqatError where this installation was made without a compiler."""
    if not LIBRARY.is_file():
        raise SqatError("this installation of sqat has no compiled runtime", how_to_get_it())
    return LIBRARY


def how_to_get_it() -> str:
    """What to do on this platform about a library that is missing or broken."""
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
        return "install g++ and `CC=gcc CXX=g++ pip install --force-reinstall --no-deps sqat`"
    return "it is built on Linux (x86-64, aarch64) only; files of target onnx-int8 run anywhere"


def instruction_set() -> str:
    """``avx512_vnni``, ``avx2`` or ``scalar``: what a session opened now would use.

    Errors: SqatError where the library is missing or broken, and where ``SQAT_RUNTIME_ISA`` names none of them or one
    this processor lacks.
    """
    ask = load().SqatInstructionSet
    ask.restype = ctypes.c_char_p
    answer = str(ask().decode())
    if answer.startswith("error: "):
        raise SqatError(answer.removeprefix("error: "))
    return answer


def load() -> ctypes.CDLL:
    """The library in this process; SqatError where it is cut short, for another processor or not ours."""
    path = library()
    if cut_short(path):
        raise SqatError("the compiled runtime cannot be loaded: it is cut short", how_to_get_it(), str(path))
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.SqatInstructionSet  # noqa: B018  # found when it is asked for
    except (OSError, AttributeError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        raise SqatError(f"the compiled runtime cannot be loaded: {reason}", how_to_get_it(), str(path)) from error
    return loaded


def cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which linkers put last: loading it may end the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or not head.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    (start,), (size, count) = struct.unpack_from("<Q", head, 0x28), struct.unpack_from("<HH", head, 0x3A)
    return bool(path.stat().st_size < start + size * count)


def session(
    path: str | Path, options: onnxruntime.SessionOptions | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that knows sqat's ops.

    Args:
        path: an ONNX file; one without sqat's ops works as well.
        options: of the session; the ops are registered with them, once, where the file needs them. Options that have
            them already, by `register_custom_ops_library`, are left as they are.
        threads: within one call, shared by all layers; ONNX Runtime's default without it.

    Errors: SqatError where the library is missing or refuses this processor, or options have the ops twice; ONNX
    Runtime's own for the file.
    """
    import onnxruntime

    instruction_set()
    given, options = options is not None, onnxruntime.SessionOptions() if options is None else options
    if threads is not None:
        options.intra_op_num_threads = threads
    if not given:
        register(options)
    try:
        return open_file(path, options)
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        if TWICE in str(error):
            raise SqatError("sqat's ops are registered twice with these options", "make new SessionOptions") from error
        if options in _REGISTERED or LACKING not in str(error):
            raise
    # Only now: nothing tells whether options have the ops, and those that get them twice are spoiled for good.
    register(options)
    return open_file(path, options)


def register(options: onnxruntime.SessionOptions) -> None:
    """Give options the ops and remember it."""
    options.register_custom_ops_library(str(library()))
    _REGISTERED.add(options)


def open_file(path: str | Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
