"""ONNX's checker and strict inference in a process of their own, which a crafted model can only end.

They read a light copy of a model from standard input and write what they refuse, or nothing. A few hundred bytes make
inference run for years, or ask for all memory.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from onnx import ModelProto

from sqat.onnx_files.checks import one_line, structure_fault, typing_fault

SECONDS = 1.5  # of the processor; a usual model needs some hundredths
NODES_PER_SECOND = 1000  # of a large model, beyond that
MEMORY = 8 << 30  # bytes of address space
HOME = Path(__file__).parents[2]  # -m imports from its folder first, and a user's may hold an onnx.py
TOO_LONG = -getattr(signal, "SIGPROF", 1000)  # exit code of a process that has used up its seconds
CLOCK = 20  # seconds of the clock for one of the processor, on a busy machine


def check_apart(light: ModelProto) -> str:
    """Return what ONNX's checker or strict inference refuses in a light copy; empty if nothing.

    A model for which they crash, or take more time or memory than such a model can need, is refused too.
    """
    count = len(light.graph.node) + sum(len(function.node) for function in light.functions)
    seconds = SECONDS + count / NODES_PER_SECOND
    command = [sys.executable, "-m", "sqat.onnx_files.check_process", str(seconds)]
    code, answer = TOO_LONG, ""
    try:
        process = subprocess.run(command, input=light.SerializeToString(), capture_output=True,
                                 timeout=CLOCK * (1 + seconds), cwd=HOME)  # fmt: skip
        code, answer = process.returncode, process.stdout.decode("utf-8", errors="replace").strip()
    except subprocess.TimeoutExpired:
        pass
    if code == TOO_LONG:
        return f"ONNX's checker needs more than {seconds:.1f} seconds for its {count} nodes"
    if code:
        return f"ONNX's checker ends with code {code} at it"
    return answer


def limit_process(seconds: float) -> None:
    """End this process where it takes too much time or memory; Windows has neither limit."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    sys.stdout.buffer.write(check_here(sys.stdin.buffer.read(), float(sys.argv[1])))


def check_here(light: bytes, seconds: float) -> bytes:
    """Return what ONNX refuses; end this process where it needs too much."""
    model = ModelProto.FromString(light)
    limit_process(seconds)
    try:
        fault = structure_fault(model) or typing_fault(model)
    except MemoryError as error:
        fault = f"ONNX's checker needs more than {MEMORY >> 30} GB for it ({one_line(error)})"
    return fault.encode("utf-8", errors="backslashreplace")


if __name__ == "__main__":
    main()
