"""What long work tells its watcher; the console draws it, tests collect it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Display(Protocol):
    """Receiver of progress: one line of news at a time, and at most one bar."""

    def say(self, text: str) -> None:
        """Tell one line of news."""

    def begin(self, title: str, total: int) -> None:
        """Open a bar of ``total`` steps."""

    def update(self, step: int, values: Mapping[str, float], rate: float) -> None:
        """Move the bar to ``step`` with loss parts and metrics ``values`` at ``rate`` samples a second."""

    def end(self) -> None:
        """Close the bar."""


class Silent:
    """A display that shows nothing, for library use and workers other than the first."""

    def say(self, text: str) -> None:
        pass

    def begin(self, title: str, total: int) -> None:
        pass

    def update(self, step: int, values: Mapping[str, float], rate: float) -> None:
        pass

    def end(self) -> None:
        pass
