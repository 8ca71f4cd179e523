"""Peak memory of serving one artifact: the growth of a separate process while it opens and runs the artifact.

The process imports the backend's library first, so the growth is that of the model: weights, packed copies, and the
largest call. GPU memory is not measured.
"""

from __future__ import annotations

import importlib
import multiprocessing
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from sqat.bench.candidates import Candidate, open_candidate
from sqat.bench.inputs import Feeds
from sqat.errors import SqatError, first_line

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIBRARIES = {
    "torch": ("torch", "sqat.evaluation.evaluate", "transformers"),
    "onnxruntime": ("sqat.runtime.sessions",),
    "openvino": ("openvino",),
    "tensorrt": ("onnxruntime",),
    "sqat": ("onnxruntime",),
}
TIME_LIMIT = 600  # seconds


def peak_memory(candidate: Candidate, feeds: Feeds, threads: int) -> int:
    """Return the bytes by which a new process grows while it opens and runs a candidate.

    Raises:
        SqatError: there is no /proc, or the process fails or takes longer than `TIME_LIMIT`.
    """
    if not STATUS.exists():
        raise SqatError("memory is measured through /proc, which only Linux has", code="missing-hardware")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_growth, args=(sender, candidate, feeds, threads), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIME_LIMIT):
            raise SqatError(f"no answer within {TIME_LIMIT} s", code="lost-process")
        growth: int | str = receiver.recv()
    except EOFError as error:
        process.join()
        raise SqatError(f"its process ended with exit code {process.exitcode}", code="lost-process") from error
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(growth, str):
        raise SqatError(growth, code="lost-process")
    return growth


def send_growth(pipe: Connection, candidate: Candidate, feeds: Feeds, threads: int) -> None:
    """Send the bytes of `measure_growth`, or the reason why it fails."""
    try:
        pipe.send(measure_growth(candidate, feeds, threads))
    except Exception as error:  # each library has its own classes
        pipe.send(first_line(error))


def measure_growth(candidate: Candidate, feeds: Feeds, threads: int) -> int:
    """Open a candidate, run it twice, and return the peak growth of this process in bytes."""
    for name in LIBRARIES[candidate.backend]:
        importlib.import_module(name)
    RESET.write_text("5", encoding="ascii")  # resets the peak
    before = read_status("VmRSS")
    with ExitStack() as stack:
        run = open_candidate(candidate, threads, stack)
        for _ in range(2):
            run(feeds)
        return read_status("VmHWM") - before


def read_status(key: str) -> int:
    """Read an entry of this process's status, in bytes."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
