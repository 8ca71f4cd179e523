"""What every command prints: texts and JSON on standard output, errors on standard error.

Nothing else in sqat writes there. So this is the one place where text from outside is escaped: names of columns,
layers and files, labels, and the lines of other libraries.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sqat.errors import SqatError, escape_control

STORE_TIMEOUT = 10.0  # seconds to wait for the launcher's store


class SafeConsole(Console):
    """A console that escapes control characters in every text, also in the cells of tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_control(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        return super().render(self.escape(renderable) if isinstance(renderable, Text) else renderable, options)

    def escape(self, text: Text) -> Text:
        """Escape a text with styles."""
        if text.plain.isprintable():
            return text
        parts = [(escape_control(segment.text), segment.style or "") for segment in text.render(self)]
        return Text.assemble(*parts, justify=text.justify, overflow=text.overflow, no_wrap=text.no_wrap, end=text.end)


def error_console() -> Console:
    """Return the console for messages, progress and errors."""
    return SafeConsole(stderr=True, highlight=False, markup=False, emoji=False)


def result_console(width: int | None = None) -> Console:
    """Return the console for results, of the terminal's width or another."""
    return SafeConsole(width=width, highlight=False, markup=False, emoji=False)


def print_error(error: SqatError) -> None:
    """Print a user's mistake in one line; a terminal wraps it between words."""
    print_failure(str(error), label="error: ")


def print_failure(text: str, label: str = "") -> None:
    """Print in one line why the command failed."""
    if not is_first_to_fail():
        return
    console = error_console()
    console.print(Text.assemble((label, "bold red"), escape_control(text)), soft_wrap=not console.is_terminal)


def is_first_to_fail() -> bool:
    """Return whether this rank prints why a run failed: of the ranks of a launcher, the first that asks.

    The first failure is the cause: a rank that ends takes the others with it. The ranks agree through the store of
    torchrun or `accelerate launch`, which outlives them. Without a store every rank prints.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=timedelta(seconds=STORE_TIMEOUT))  # fmt: skip
        return store.add(f"sqat/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except DistError:
        return True


def print_text(text: str) -> None:
    """Print a line on standard output."""
    print(escape_control(text))


def print_json(value: Any) -> None:
    """Print JSON on standard output; infinities and NaN become strings that Python's float() reads."""
    text = json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    print("\n".join(escape_json(line) for line in text.split("\n")))


def escape_json(line: str) -> str:
    """Escape what `escape_control` escapes, in JSON's way: the line means the same."""
    return "".join(c if escape_control(c) == c else json.dumps(c)[1:-1] for c in line)


def to_json(value: Any) -> Any:
    """Replace what JSON cannot hold: non-finite numbers become strings, tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def relative_path(path: Path) -> str:
    """Return a path relative to the working folder if it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def format_time(seconds: float | None) -> str:
    """Format seconds as ``4.2s``, ``3m05s`` or ``2h07m``; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
