"""Peak memory of serving one artifact: how far a process of its own grows from before it is opened.

The backend's library is imported first and not counted, so that the figure is the model's: weights, packed copies of
them, and what its largest call needs. In the measuring process itself candidates could not be told apart.
Left out: memory of a GPU.
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
    """Bytes by which a fresh process grows while it opens a candidate and calls it.

    Raises:
        SqatError: Linux's /proc is not here, or the process failed, died or took longer than `TIME_LIMIT`.
    """
    if not STATUS.exists():
        raise SqatError("it is read from Linux's /proc, which is not here")
    context = multiprocessing.get_context("spawn")
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_growth, args=(theirs, candidate, feeds, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        if not answer.poll(TIME_LIMIT):
            raise SqatError(f"no answer within {TIME_LIMIT} s")
        found: int | str = answer.recv()
    except EOFError as error:
        process.join()
        raise SqatError(f"its process ended with exit code {process.exitcode}") from error
    finally:
        process.kill()
        process.join()
        answer.close()
    if isinstance(found, str):
        raise SqatError(found)
    return found


def send_growth(pipe: Connection, candidate: Candidate, feeds: Feeds, threads: int) -> None:
    """Send `grow`'s bytes, or in words why there are none."""
    try:
        pipe.send(grow(candidate, feeds, threads))
    except Exception as error:  # each library has classes of its own
        pipe.send(first_line(error))


def grow(candidate: Candidate, feeds: Feeds, threads: int) -> int:
    """Open and call a candidate twice, and measure this process meanwhile."""
    for name in LIBRARIES[candidate.backend]:
        importlib.import_module(name)
    RESET.write_text("5", encoding="ascii")  # the peak begins anew
    before = read_status("VmRSS")
    with ExitStack() as stack:
        run = open_candidate(candidate, threads, stack)
        for _ in range(2):
            run(feeds)
        return read_status("VmHWM") - before


def read_status(key: str) -> int:
    """Bytes of an entry of this process's status."""
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
