"""Serving int8 encoders with 2:4 weights on ordinary CPUs: the custom ops and sessions that have them.

What: `session` opens an ONNX file of the target ``cpu-sparse`` as an ordinary `onnxruntime.InferenceSession`;
`library` is the shared library of the ops, for C, C++, C# and Java; `instruction_set` is what it would use here.

Why a library of custom ops: ONNX Runtime keeps threads, memory and the API its users know, and needs one
registration line. The sources are in ``source/``; they are compiled when sqat is installed, if there is a compiler.
Left out: training, and every graph of other export targets (`onnxruntime` alone runs those).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from sqat.errors import SqatError

if TYPE_CHECKING:
    import onnxruntime

LIBRARY = Path(__file__).with_name("libsqat_runtime.so")
# Options that have the ops: ONNX Runtime refuses a domain it was given before.
_REGISTERED: WeakSet[onnxruntime.SessionOptions] = WeakSet()


def library() -> Path:
    """The shared library; SqatError where this installation was made without a compiler."""
    if not LIBRARY.is_file():
        raise SqatError(
            "this installation of sqat has no compiled runtime",
            "install g++ and `pip install --force-reinstall --no-deps sqat`",
        )
    return LIBRARY


def instruction_set() -> str:
    """``avx512_vnni``, ``avx2`` or ``scalar``: what a session opened now would use.

    Errors: SqatError where ``SQAT_RUNTIME_ISA`` names none of them or one this processor lacks.
    """
    ask = ctypes.CDLL(str(library())).SqatInstructionSet
    ask.restype = ctypes.c_char_p
    answer = str(ask().decode())
    if answer.startswith("error: "):
        raise SqatError(answer.removeprefix("error: "))
    return answer


def session(
    path: str | Path, options: onnxruntime.SessionOptions | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that knows sqat's ops.

    Args:
        path: an ONNX file; one without sqat's ops works as well.
        options: of the session; the ops are registered with them, once.
        threads: within one call, shared by all layers; ONNX Runtime's default without it.

    Errors: SqatError where the library is missing or refuses this processor; ONNX Runtime's own for the file.
    """
    import onnxruntime

    instruction_set()
    options = onnxruntime.SessionOptions() if options is None else options
    if threads is not None:
        options.intra_op_num_threads = threads
    if options not in _REGISTERED:
        options.register_custom_ops_library(str(library()))
        _REGISTERED.add(options)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
