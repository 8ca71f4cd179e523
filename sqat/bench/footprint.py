"""Peak memory of serving one artifact: how far a process of its own grows from before it is opened.

The backend's library is imported first and not counted, so that the figure is the model's: weights, packed copies of
them, and what its largest call needs. In the measuring process itself candidates could not be told apart.
Left out: memory of a GPU.
"""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from sqat.bench.candidates import Candidate, open_candidate
from sqat.bench.inputs import Feeds

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIBRARIES = {
    "torch": ("torch", "sqat.evaluation", "transformers"),
    "onnxruntime": ("sqat.export.runtime",),
    "openvino": ("openvino",),
    "tensorrt": ("onnxruntime",),
    "sqat": ("onnxruntime",),
}
TIME_LIMIT = 600


def peak_memory(candidate: Candidate, feeds: Feeds, threads: int) -> int | None:
    """Bytes by which a fresh process grows while it opens a candidate and calls it; None where Linux's /proc is not."""
    if not STATUS.exists():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, suppress(Exception):
        return pool.submit(grow, candidate, feeds, threads).result(TIME_LIMIT)
    return None


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
