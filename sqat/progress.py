"""The reporter protocol: how long-running work reports messages and progress.

The CLI draws what it reports; tests record it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Receiver of messages and of at most one progress bar at a time."""

    def info(self, text: str) -> None:
        """Report one line of text."""

    def start(self, title: str, total: int) -> None:
        """Open a progress bar of ``total`` steps."""

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        """Move the bar to ``step``; ``values`` are losses and metrics, ``rate`` is samples per second."""

    def finish(self) -> None:
        """Close the progress bar."""


class SilentReporter:
    """A reporter that shows nothing: for library use and for ranks other than 0."""

    def info(self, text: str) -> None:
        pass

    def start(self, title: str, total: int) -> None:
        pass

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        pass

    def finish(self) -> None:
        pass
