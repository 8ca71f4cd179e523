"""Ctrl-C and SIGTERM while a model trains: the loop saves its state and stops at the next step.

The first signal is recorded, a second one interrupts at once, a third kills. All ranks stop at the same step.
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
ONE_CTRL_C = 1.0  # seconds in which a terminal and a launcher both pass one Ctrl-C on


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Record signals while open; yields a function that says whether there was one.

    Only the main thread gets signals; in others the function always says no.
    """
    times: list[float] = []

    def record(number: int, frame: FrameType | None) -> None:
        times.append(time.monotonic())
        repeated = distributed.is_initialized() and times[-1] - times[0] < ONE_CTRL_C
        if len(times) > 1 and not repeated:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield lambda: bool(times)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
