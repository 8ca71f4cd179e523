"""The reporters of the command line: a progress bar in a terminal, plain lines elsewhere and in the log file.

Messages and progress go to standard error, results to standard output: ``--json`` and pipes stay clean. Ranks other
than 0 report nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sqat.cli import printing
from sqat.cli.printing import format_time
from sqat.errors import escape_control
from sqat.files.replace import append_text, cannot_write
from sqat.progress import Reporter, SilentReporter

SECONDS_BETWEEN_LINES = 10.0
TITLE_WIDTH = 24


class LineReporter:
    """Plain lines for files and pipes: at the start, every 10 % or 10 s, and at the end.

    Args:
        write: prints one line without its line break.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.print_line = write
        self.title, self.total = "", 0
        self.start_time = self.written_time = 0.0
        self.written_step = self.step = 0
        self.line = ""

    def write(self, line: str) -> None:
        """Print one line, whatever the text holds."""
        self.print_line(escape_control(line))

    def info(self, text: str) -> None:
        self.write(text)

    def start(self, title: str, total: int) -> None:
        self.title, self.total, self.line = title, total, ""
        self.written_step = self.step = 0
        self.start_time = self.written_time = time.monotonic()
        self.write(f"{title}: {total} steps")

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        now = time.monotonic()
        left = (now - self.start_time) / max(step, 1) * max(self.total - step, 0)
        parts = [f"{step}/{self.total}", *format_values(values), f"{rate:.1f} samples/s", f"{format_time(left)} left"]
        self.step, self.line = step, f"{self.title}: {', '.join(parts)}"
        is_tenth = step - self.written_step >= self.total / 10 and now - self.written_time >= 1
        if is_tenth or now - self.written_time >= SECONDS_BETWEEN_LINES:
            self.written_step, self.written_time = step, now
            self.write(self.line)

    def finish(self) -> None:
        if self.line and self.step != self.written_step:
            self.write(self.line)
        self.write(f"{self.title}: done in {format_time(time.monotonic() - self.start_time)}")


class BarReporter:
    """A progress bar for terminals: title, steps, samples per second and time left; below it losses and metrics."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def info(self, text: str) -> None:
        self.console.print(text)

    def start(self, title: str, total: int) -> None:
        self.finish()
        self.progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self.values = Text("", style="dim")
        self.task = self.progress.add_task(title[:TITLE_WIDTH], total=total, rate="")
        group = Group(self.progress, self.values)
        self.live = Live(group, console=self.console, transient=True, refresh_per_second=5)
        self.live.start()

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        if self.live is not None:
            self.progress.update(self.task, completed=step, rate=f"{rate:.0f}/s")
            self.values.plain = "  " + "  ".join(text.replace(" ", "=") for text in format_values(values))

    def finish(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


class Reporters:
    """Several reporters as one: the screen and the log file."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def info(self, text: str) -> None:
        for reporter in self.reporters:
            reporter.info(text)

    def start(self, title: str, total: int) -> None:
        for reporter in self.reporters:
            reporter.start(title, total)

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        for reporter in self.reporters:
            reporter.advance(step, values, rate)

    def finish(self) -> None:
        for reporter in self.reporters:
            reporter.finish()


@contextmanager
def open_reporter(*, quiet: bool = False, log: Path | None = None) -> Iterator[Reporter]:
    """Open a reporter on standard error, and on the file ``log`` if given; the block's end removes its bar."""
    if not is_rank0():
        yield SilentReporter()
        return
    console = printing.error_console()
    reporters: list[Reporter] = []
    if not quiet:
        has_bar = console.is_terminal and not console.is_dumb_terminal
        reporters.append(BarReporter(console) if has_bar else LineReporter(lambda line: print(line, file=sys.stderr)))
    if log is not None:
        reporters.append(LineReporter(lambda line: append_line(log, line)))
    try:
        yield Reporters(reporters)
    finally:
        for reporter in reporters:
            if isinstance(reporter, BarReporter):
                reporter.finish()


def is_rank0() -> bool:
    """Return whether this process is rank 0, the only one that reports and prints results; needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def append_line(path: Path, line: str) -> None:
    """Append a line with the time of day to a log file.

    Raises:
        SqatError: the file cannot be written.
    """
    try:
        append_text(path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    except OSError as error:
        raise cannot_write(error, path) from error


def format_values(values: Mapping[str, float]) -> list[str]:
    """Format losses and metrics as ``name value``."""
    return [f"{name} {value:.4g}" for name, value in values.items()]
