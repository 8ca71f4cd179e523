"""What is drawn: plain lines at the right moments, a bar that fits, tables of 80 columns, JSON that is JSON."""

from __future__ import annotations

import io
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from sqat.cli import printing, progress_bars
from sqat.cli.tables import layers as layer_tables
from sqat.cli.tables import layout
from sqat.cli.tables import results as result_tables
from sqat.errors import SqatError
from sqat.lint.layer_row import LayerRow
from sqat.pipeline.plan import PlannedStage
from sqat.pipeline.results import ResultRow, Results

LONG = "a-stage-with-a-very-long-name-indeed"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "NO_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)


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


def test_the_end_of_a_stage_without_steps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_bar_fits_80_columns_and_says_all() -> None:
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
    error = SqatError("unknown key 'x' [bold] in stages.train", "allowed: " + ", ".join(["epochs"] * 20), "r.yaml:7")
    printing.print_error(error)
    assert capsys.readouterr().err == f"error: {error}\n"
    file = io.StringIO()
    monkeypatch.setattr(printing, "error_console", lambda: Console(file=file, force_terminal=True, width=80))
    printing.print_error(error)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert " ".join(line.strip() for line in lines) == f"error: {error}"


def results(metrics: dict[str, float], folder: str) -> Results:
    labels = ["dense fp32", "dense int8 (PTQ)", "sparse fp32", "sparse int8 (Sparse-QAT)"]
    rows = [ResultRow(label, "x", metrics, 24_868_376, Path(folder) / label.replace(" ", "-")) for label in labels]
    return Results(rows, "test", "3f4a" * 16, Path("runs/relevance"))


def output_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert not any("\x1b" in line for line in lines)
    return lines


def test_a_narrow_table_holds_the_paths(capsys: pytest.CaptureFixture[str]) -> None:
    result_tables.print_results(results({"accuracy": 0.9}, "runs"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["accuracy", "MB", "path"]
    assert lines[2].split() == ["dense", "fp32", "0.9000", "24.9", "runs/dense-fp32"]


def test_paths_go_below_a_wide_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"ndcg@10": 0.7841, "pnr": 4.514, "mrr": 0.771, "accuracy": 0.91}
    result_tables.print_results(results(metrics, "/" + "folder/" * 12))
    lines = output_of(capsys)
    assert lines[0].split() == ["ndcg@10", "pnr", "mrr", "accuracy", "MB"]
    assert lines[5].split() == ["sparse", "int8", "(Sparse-QAT)", "0.7841", "4.514", "0.7710", "0.9100", "24.9"]
    assert max(len(line) for line in lines[:6]) <= 80
    assert lines[7] == "dense fp32: /" + "folder/" * 12 + "dense-fp32", "a path is never broken"


def test_counts_have_no_decimals_and_an_empty_table_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    result_tables.print_results(results({"accuracy": 1.0, "pnr": float("inf"), "queries": 237.0}, "runs"))
    assert output_of(capsys)[2].split()[:5] == ["dense", "fp32", "1.0000", "inf", "237"]
    result_tables.print_results(Results([], "test", "3f4a" * 16, Path("runs/relevance")))
    assert output_of(capsys) == ["no results yet in runs/relevance"]


def test_metrics_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {f"metric_number_{number}": 0.5 for number in range(8)}
    result_tables.print_results(results(metrics, "runs"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines[:6]) <= 80
    shown = [name for name in lines[0].split() if name in metrics]
    hidden = " ".join(lines).partition("--json also shows: ")[2].partition(" test split")[0]
    assert shown + [name.strip() for name in hidden.split(",")] == list(metrics)
    assert shown


def test_the_plan_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        PlannedStage(9, LONG, "prune", LONG[::-1], "3f4a" * 4, Path("x"), False, 123_400, 3_840_000, 8000.0),
        PlannedStage(10, "qat", "qat", LONG, "3f4a" * 4, Path("x"), True, 99_999, 999_999, 12.0),
        PlannedStage(11, "export", "export", "qat", "3f4a" * 4, Path("x"), False, None, 128, None),
    ]
    result_tables.print_plan(plan)
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[2].split()[-6:] == ["3f4a3f4", "123k", "3.84M", "2h13m", "will", "run"]
    assert lines[-1] == "2 of 3 stages will run, time 2h13m, and 1 of unknown time"
    result_tables.print_plan(plan[1:2])
    assert output_of(capsys)[-1] == "nothing to do: every stage is unchanged"


def layers() -> list[LayerRow]:
    parts = [
        ("attention.self.query", (384, 384)),
        ("attention.output.dense", (384, 384)),
        ("output.dense", (384, 1536)),
    ]
    found = [
        LayerRow(f"bert.encoder.layer.{n}.{name}", shape, "2:4", 0.5, (0.00123, 0.0098), 3.4567, 38.23, 0.00012, "")
        for n in (0, 11)
        for name, shape in parts
    ]
    left = "outside the encoder (B8)"
    found.append(LayerRow("bert.pooler.dense", (384, 384), "dense", 0.001, None, None, None, None, left))
    return [*found, LayerRow("classifier", (1, 384), "dense", 0.0, None, None, None, 0.0, left)]


def test_layers_fit_80_columns_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    layer_tables.print_layers(layers(), Path("x"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["layer", "shape", "N:M", "zero%", "scale", "amax", "SQNR", "sat.%"]
    names = [line.split()[0] for line in lines[2:10]]
    assert names[:3] == ["~0.attention.output.dense", "~0.attention.self.query", "~0.output.dense"]
    assert names[3:6] == [name.replace("0", "11") for name in names[:3]]
    assert lines[3].split() == ["~0.attention.self.query", "384x384", "2:4", "50.0", "1.2-9.8", "3.46", "38.2", "0.01"]
    assert "a: skipped: outside the encoder (B8) (2 of 8 layers)" in lines
    assert lines[9].split()[:4] == ["classifier", "1x384", "dense", "a"]
    assert "~ is bert.encoder.layer." in lines


def test_layers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    layer_tables.print_layers(layers(), Path("x"), as_json=True)
    value = json.loads("\n".join(output_of(capsys)))
    assert value["layers"][1] == {
        "name": "bert.encoder.layer.0.attention.self.query",
        "shape": [384, 384],
        "pattern": "2:4",
        "zeros": 0.5,
        "weight_scale": [0.00123, 0.0098],
        "input_amax": 3.4567,
        "sqnr_db": 38.23,
        "saturated": 0.00012,
        "reason": "",
    }


def test_json_says_what_json_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_json({"a": float("inf"), "b": [-float("inf"), float("nan")], "c": (1, None, "é")})
    text = capsys.readouterr().out
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert value == {"a": "Infinity", "b": ["-Infinity", "NaN"], "c": [1, None, "é"]}
    assert float(value["a"]) == float("inf")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0s"), (9.94, "9.9s"), (9.99, "10s"), (59.6, "1m00s"), (61, "1m01s"), (3599.7, "1h00m"),
     (8000, "2h13m")],
)  # fmt: skip
def test_times(seconds: float | None, text: str) -> None:
    assert printing.format_time(seconds) == text


def test_counts_and_shares_fit_their_columns() -> None:
    assert [layout.format_count(count) for count in (None, 0, 99_999, 123_400, 999_999, 3_840_000)] == [
        "-", "0", "99,999", "123k", "1M", "3.84M",
    ]  # fmt: skip
    assert [layer_tables.format_saturation(share) for share in (0, 1e-6, 0.00012, 0.5, 1)] == [
        "0",
        "<0.01",
        "0.01",
        "50.00",
        "100.00",
    ]
