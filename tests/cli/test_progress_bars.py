"""Plain lines at the right moments, a bar that fits 80 columns, errors in one line."""

from __future__ import annotations

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from sqat.cli import printing, progress_bars
from sqat.errors import SqatError

LONG = "a-stage-with-a-very-long-name-indeed"


class Clock:
    """A clock that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("sqat.cli.progress_bars.time.monotonic", lambda: self.now)


def run_lines(clock: Clock, total: int, seconds_a_step: float) -> list[str]:
    lines: list[str] = []
    reporter = progress_bars.LineReporter(lines.append)
    reporter.start("qat", total)
    for step in range(1, total + 1):
        clock.now += seconds_a_step
        reporter.advance(step, {"loss": 1 / step}, 32.0)
    reporter.finish()
    return lines


def test_lines_of_a_short_stage_are_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_lines(Clock(monkeypatch), 4, 0.1)
    assert lines == [
        "qat: 4 steps",
        "qat: 4/4, loss 0.25, 32.0 samples/s, 0.0s left",
        "qat: done in 0.4s",
    ]


def test_lines_come_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_lines(Clock(monkeypatch), 100, 0.5)
    assert [line.split(",")[0] for line in lines[1:-1]] == [f"qat: {step}/100" for step in range(10, 101, 10)]
    assert lines[1] == "qat: 10/100, loss 0.1, 32.0 samples/s, 45s left"


def test_lines_of_a_slow_stage_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_lines(Clock(monkeypatch), 30, 6.0)
    assert [line.split(",")[0] for line in lines[1:4]] == ["qat: 2/30", "qat: 4/30", "qat: 6/30"]
    assert lines[-1] == "qat: done in 3m00s"


def test_a_stage_without_steps_reports_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_lines(Clock(monkeypatch), 0, 1.0) == ["qat: 0 steps", "qat: done in 0.0s"]


def draw_bar(*, no_color: bool) -> str:
    file = io.StringIO()
    screen = Console(file=file, force_terminal=True, width=80, no_color=no_color, color_system="truecolor")
    bar = progress_bars.BarReporter(screen)
    bar.start(LONG, 123_400)
    values = {"loss": 0.04938, "task": 0.5, "minilm": 0.00345, "logits": 2.1e-07, "lr": 1.2e-05, "ndcg@10": 0.7841}
    bar.advance(12_345, values, 845.2)
    assert bar.live is not None
    bar.live.refresh()
    bar.info("a line of news")
    bar.finish()
    return file.getvalue()


def test_the_bar_fits_80_columns_and_shows_all_values() -> None:
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", draw_bar(no_color=False))
    lines = drawn.replace("\r", "\n").splitlines()
    assert max(len(line) for line in lines) <= 80
    bar = next(line for line in lines if "12345/123400" in line)
    assert bar.startswith(LONG[: progress_bars.TITLE_WIDTH])
    assert "845/s" in bar
    for value in ("loss=0.04938", "minilm=0.00345", "ndcg@10=0.7841"):
        assert value in drawn
    assert "a line of news" in lines


def test_no_color_means_no_colour() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[;m]")
    assert colour.search(draw_bar(no_color=False))
    assert not colour.search(draw_bar(no_color=True))


def test_no_color_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert printing.result_console().no_color
    assert printing.error_console().no_color


def test_the_cursor_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(printing, "error_console", lambda: Console(file=file, force_terminal=True, width=80))
    with suppress(KeyboardInterrupt), progress_bars.open_reporter() as reporter:
        reporter.start("qat", 10)
        raise KeyboardInterrupt
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_errors_are_one_line_in_a_file_and_wrapped_at_words_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = SqatError(
        "unknown key 'x' [bold] in stages.train", "allowed: " + ", ".join(["epochs"] * 20), "r.yaml:7", code="usage"
    )
    printing.print_error(error)
    assert capsys.readouterr().err == f"error: {error}\n"
    file = io.StringIO()
    monkeypatch.setattr(printing, "error_console", lambda: Console(file=file, force_terminal=True, width=80))
    printing.print_error(error)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert " ".join(line.strip() for line in lines) == f"error: {error}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0s"), (9.94, "9.9s"), (9.99, "10s"), (59.6, "1m00s"), (61, "1m01s"), (3599.7, "1h00m"),
     (8000, "2h13m")],
)  # fmt: skip
def test_times(seconds: float | None, text: str) -> None:
    assert printing.format_time(seconds) == text
