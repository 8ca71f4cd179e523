"""Custom ops of ONNX Runtime that run int8 encoders with 2:4 weights on ordinary CPUs.

`session` opens a file of the target ``cpu-sparse``. `library` is the shared library of the ops, for C, C++, C# and
Java; it holds the kernels of training too (`sqat.runtime.kernels`). Installing sqat compiles it from ``source/``.
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
# Options that have the ops: ONNX Runtime refuses a domain that is registered twice.
_REGISTERED: WeakSet[onnxruntime.SessionOptions] = WeakSet()
# Messages of ONNX Runtime where options lack the ops, and where they have them twice.
OPS_MISSING, OPS_TWICE = "is not a registered function/op", "Domain already set in registry"


def library() -> Path:
    """Return the path of the shared library; SqatError where sqat was installed without a compiler."""
    if not LIBRARY.is_file():
        raise SqatError("this installation of sqat has no compiled runtime", install_hint(), code="missing-package")
    return LIBRARY


def install_hint() -> str:
    """Say what to do on this platform about a library that is missing or broken."""
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
        return "install g++ and `CC=gcc CXX=g++ pip install --force-reinstall --no-deps sqat`"
    return "it is built on Linux (x86-64, aarch64) only; files of target onnx-int8 run anywhere"


def instruction_set() -> str:
    """Return what a session opened now would use: ``avx512_vnni``, ``avx2`` or ``scalar``.

    Raises:
        SqatError: the library is missing or broken, or ``SQAT_RUNTIME_ISA`` names none of these or one that this
            processor lacks.
    """
    function = load().SqatInstructionSet
    function.restype = ctypes.c_char_p
    answer = str(function().decode())
    if answer.startswith("error: "):
        raise SqatError(answer.removeprefix("error: "), code="missing-hardware")
    return answer


def load() -> ctypes.CDLL:
    """Load the library; SqatError where it is truncated, for another processor or another library."""
    path = library()
    reason = "the file is truncated" if is_truncated(path) else ""
    try:
        if not reason:
            loaded = ctypes.CDLL(str(path))
            loaded.SqatInstructionSet  # noqa: B018  # AttributeError where it is another library
            return loaded
    except (OSError, AttributeError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
    problem = f"the compiled runtime cannot be loaded: {reason}"
    raise SqatError(problem, install_hint(), str(path), code="missing-package")


def is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section table, which linkers put last: loading it may end the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return False
    (start,), (size, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return bool(path.stat().st_size < start + size * count)


def session(
    path: str | Path, options: onnxruntime.SessionOptions | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open an ONNX file in a session that has sqat's ops.

    Args:
        path: an ONNX file, with or without sqat's ops.
        options: of the session. The ops are registered with them once, where the file needs them; options that have
            them already, by `register_custom_ops_library`, stay as they are.
        threads: of one call, shared by all layers; default: ONNX Runtime's.

    Raises:
        SqatError: the library is missing, does not support this processor, or the options have the ops twice.
        Exception: ONNX Runtime's own, for the file.
    """
    import onnxruntime

    instruction_set()
    is_new, options = options is None, onnxruntime.SessionOptions() if options is None else options
    if threads is not None:
        options.intra_op_num_threads = threads
    if is_new:
        options.log_severity_level = 4  # failures are exceptions; ONNX Runtime would also print them in colour
        register(options)
    try:
        return open_file(path, options)
    except Exception as error:  # onnxruntime's own classes are private and differ between versions
        if OPS_TWICE in str(error):
            problem = "sqat's ops are registered twice with these options"
            raise SqatError(problem, "make new SessionOptions", code="usage") from error
        if options in _REGISTERED or OPS_MISSING not in str(error):
            raise
    # Only now: options do not say whether they have the ops, and registering twice makes them unusable.
    register(options)
    return open_file(path, options)


def register(options: onnxruntime.SessionOptions) -> None:
    """Register sqat's ops with session options, and note that they have them: twice is an error."""
    options.register_custom_ops_library(str(library()))
    _REGISTERED.add(options)


def open_file(path: str | Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a file in ONNX Runtime on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
