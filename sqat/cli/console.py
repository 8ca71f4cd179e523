"""What a person sees while work goes on: progress, news and errors; with `sqat.cli.tables` the only Rich code.

News and progress go to standard error, results to standard output, so that ``--json`` and pipes stay clean.
In a terminal a bar moves; anywhere else (a file, a pipe, a dumb terminal) plain lines are written now and
then. Colours follow NO_COLOR, the width is the terminal's. Left out: processes of a distributed run other
than the first, which say nothing but why the run fails, if they know it first.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sqat.errors import SqatError
from sqat.progress import Reporter, SilentReporter

SECONDS_BETWEEN_LINES = 10.0
TITLE_WIDTH = 24
LONGEST_ASKING = 10.0  # seconds, of the launcher's store


class LineReporter:
    """Plain lines for files and pipes: at the start, every 10 % or 10 s, and at the end.

    Args:
        write: takes one line without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.title, self.total = "", 0
        self.started = self.told_at = 0.0
        self.told_step = self.step = 0
        self.line = ""

    def info(self, text: str) -> None:
        self.write(text)

    def start(self, title: str, total: int) -> None:
        self.title, self.total, self.line = title, total, ""
        self.told_step = self.step = 0
        self.started = self.told_at = time.monotonic()
        self.write(f"{title}: {total} steps")

    def advance(self, step: int, values: Mapping[str, float], rate: float) -> None:
        now = time.monotonic()
        left = (now - self.started) / max(step, 1) * max(self.total - step, 0)
        parts = [f"{step}/{self.total}", *show_values(values), f"{rate:.1f} samples/s", f"{show_time(left)} left"]
        self.step, self.line = step, f"{self.title}: {', '.join(parts)}"
        due = step - self.told_step >= self.total / 10 and now - self.told_at >= 1
        if due or now - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_step, self.told_at = step, now
            self.write(self.line)

    def finish(self) -> None:
        if self.line and self.step != self.told_step:
            self.write(self.line)
        self.write(f"{self.title}: done in {show_time(time.monotonic() - self.started)}")


class BarReporter:
    """A moving bar for terminals: title, steps, samples a second, time left; below it losses and metrics."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def info(self, text: str) -> None:
        self.console.print(Text(text))

    def start(self, title: str, total: int) -> None:
        self.finish()
        self.progress = Progress(
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
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
            self.values.plain = "  " + "  ".join(text.replace(" ", "=") for text in show_values(values))

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


def is_first_process() -> bool:
    """Whether this process is the one of a distributed run that speaks."""
    return os.environ.get("RANK", "0") == "0"


def is_first_to_fail() -> bool:
    """Whether this process tells how a run ends: of those that a launcher started, the first that asks.

    What comes first is the cause; a process that ends takes the others with it. The store asked is that of torchrun,
    or of `accelerate launch`, which outlives the processes. Where there is none, all of them tell.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         timeout=timedelta(seconds=LONGEST_ASKING))  # fmt: skip
        return store.add(f"sqat/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except DistError:
        return True


@contextmanager
def open_reporter(*, quiet: bool = False, log: Path | None = None) -> Iterator[Reporter]:
    """A reporter on standard error, and in the file ``log`` if given; its bar is gone when the block ends."""
    if not is_first_process():
        yield SilentReporter()
        return
    console = error_console()
    reporters: list[Reporter] = []
    if not quiet:
        moving = console.is_terminal and not console.is_dumb_terminal
        reporters.append(BarReporter(console) if moving else LineReporter(lambda line: print(line, file=sys.stderr)))
    if log is not None:
        reporters.append(LineReporter(lambda line: append_line(log, line)))
    try:
        yield Reporters(reporters)
    finally:
        for reporter in reporters:
            if isinstance(reporter, BarReporter):
                reporter.finish()


def append_line(path: Path, line: str) -> None:
    """Add one line with the time of day to a log file; SqatError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
    except OSError as error:
        hint = "free space or choose another output"
        raise SqatError(f"cannot be written: {error.strerror}", hint, str(path)) from error


def error_console() -> Console:
    """The console for news and errors."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def result_console() -> Console:
    """The console for results."""
    return Console(highlight=False, markup=False, emoji=False)


def print_error(error: SqatError) -> None:
    """A user's mistake: one line on standard error, wrapped at words in a terminal."""
    _print_failure("error", str(error))


def print_failure(text: str) -> None:
    """Any other end that was not wished for, in one line."""
    _print_failure("", text)


def _print_failure(label: str, text: str) -> None:
    if not is_first_to_fail():
        return
    console = error_console()
    line = Text.assemble((f"{label}: ", "bold red"), text) if label else Text(text)
    console.print(line, soft_wrap=not console.is_terminal)


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else; infinities and NaN as the texts Python's float() reads."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def finite(value: Any) -> Any:
    """Replace what JSON cannot say: non-finite numbers become texts, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def print_text(text: str) -> None:
    """A result that is a text of its own, as it is."""
    print(text)


def nearby(path: Path) -> str:
    """A path relative to the working folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show_values(values: Mapping[str, float]) -> list[str]:
    """Losses and metrics as ``name value``."""
    return [f"{name} {value:.4g}" for name, value in values.items()]


def show_time(seconds: float | None) -> str:
    """Seconds as ``4.2s``, ``3m05s`` or ``2h07m``; ``-`` where unknown."""
    if seconds is None:
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
