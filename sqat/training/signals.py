"""Ctrl-C and SIGTERM while a model trains: the loop stops at the next step, with nothing lost.

The first signal is only noted; a second one interrupts at once, a third kills. All processes of a distributed run
stop at the same step, whichever of them was told. Left out: threads other than the main one, which get no signals.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_CTRL_C = 1.0  # seconds in which a terminal and a launcher both pass it on


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """While the block runs, signals are noted; yields a function that says whether there was one."""
    noted: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(time.monotonic())
        repeated = distributed.is_initialized() and noted[-1] - noted[0] < ONE_CTRL_C
        if len(noted) > 1 and not repeated:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
