"""Text from outside reaches neither terminal nor log as it is, and every width prints everything."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sqat.cli import main, printing, progress_bars
from sqat.cli.streams import MIN_WIDTH, escape_record
from sqat.cli.tables.layout import Footnotes, new_table, print_paragraph
from sqat.data.batch import Batch
from sqat.errors import SqatError, escape_control
from sqat.evaluation.artifacts import open_artifact

HOSTILE = {
    "title of the terminal": "\x1b]0;owned\x07",
    "colours": "\x1b[31mred\x1b[0m",
    "C1": "\x9b31m\x85",
    "forged line": "x\n2026-01-01 00:00:00 qat: done",
    "carriage return": "x\rerror: none",
    "line separators": "a\u2028b\u2029c\x0b\x0c\x1c\x1d\x1e",
    "bidi": "user\u202egnp.exe\u2066\u2069\u061c",
    "zero width": "a\u200bb\u200d\ufeff\u00ad\u2060",
    "tags": "a\U000e0041",
    "half a character": "\ud800",
    "backspaces": "safe\b\b\b\b",
    "nul": "a\0b",
    "markup": "[bold]not bold[/bold][link=x]",
}
RAW = {c for text in HOSTILE.values() for c in text if escape_control(c) != c}


def assert_safe(output: str, text: str, *, lines: int | None = None) -> None:
    """The output holds nothing raw, and shows the text."""
    assert not RAW & set(output) - {"\n"}, ascii(output)
    shown = output.replace("\n", "").replace(" ", "")
    assert escape_control(text).replace(" ", "") in shown, ascii(output)
    if lines is not None:
        assert output.count("\n") == lines, ascii(output)


@pytest.mark.parametrize("text", ["é ü 日本 \u3000x\u00a0y 😀", "", "a-b_c [x]", "Ωμέγα"])
def test_plain_text_stays(text: str) -> None:
    assert escape_control(text) == text
    assert printing.escape_json(text) == text


@pytest.mark.parametrize("kind", HOSTILE)
def test_escaping_twice_is_escaping_once(kind: str) -> None:
    once = escape_control(HOSTILE[kind])
    assert escape_control(once) == once
    assert once.isprintable()


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_is_printed_is_escaped(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = HOSTILE[kind]
    console = printing.result_console(500)
    table: Table = new_table(text, "b")
    table.add_row(text, text)
    footnotes = Footnotes([text])
    for lines, show in (
        (1, lambda: console.print(text)),
        (None, lambda: console.print(table)),
        (None, lambda: footnotes.print(console, 1)),
        (1, lambda: printing.print_text(text)),
        (1, lambda: progress_bars.LineReporter(print).info(text)),
        (1, lambda: progress_bars.BarReporter(console).info(text)),
    ):
        show()
        assert_safe(capsys.readouterr().out, text, lines=lines)
    printing.print_error(SqatError(text, "hint", code="usage"))
    assert_safe(capsys.readouterr().err, text, lines=1)
    printing.print_failure(text)
    assert_safe(capsys.readouterr().err, text, lines=1)
    print_paragraph(console, "label", text)
    console.print(Text(text, "bold"), Text.assemble(("label ", "red"), text))  # rich drops some characters by itself
    assert not RAW & set(capsys.readouterr().out) - {"\n"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bar_and_its_values_are_escaped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, file = HOSTILE[kind], io.StringIO()
    console = printing.SafeConsole(file=file, force_terminal=True, width=200, color_system=None, highlight=False)
    reporter = progress_bars.BarReporter(console)
    reporter.start(text, 2)
    reporter.advance(1, {text: 0.5}, 1.0)
    reporter.info(text)
    reporter.finish()
    plain = file.getvalue()
    own = {"\x1b", "\r", "\n"}  # of the bar itself
    assert not RAW & set(plain) - own, ascii(plain)
    assert "\x1b]0" not in plain
    assert "\x1b[31m" not in plain
    assert escape_control(text)[:10] in plain


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_is_escaped_and_means_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE[kind]: [HOSTILE[kind], "é"]}
    printing.print_json(value)
    output = capsys.readouterr().out
    assert not RAW & set(output) - {"\n"}
    assert json.loads(output) == value
    assert "é" in output


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_text_forges_no_line_of_the_log(kind: str, tmp_path: Path) -> None:
    text = HOSTILE[kind]
    with progress_bars.open_reporter(quiet=True, log=tmp_path / "sqat.log") as reporter:
        reporter.info(text)
        reporter.start(text, 1)
        reporter.finish()
    lines = (tmp_path / "sqat.log").read_bytes().decode().split("\n")
    assert len(lines) == 4
    for line in lines[:3]:
        assert_safe(line, text)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_library_s_message_looks_like_none_of_ours(kind: str) -> None:
    record = logging.LogRecord("lib", logging.ERROR, "", 0, "%s, then %s", ("a", HOSTILE[kind]), None)
    assert escape_record(record)
    first, *others = record.getMessage().split("\n")
    assert not RAW & set(record.getMessage()) - {"\n"}
    assert first.startswith("a, then ")
    assert all(line.startswith("    ") for line in others)


def test_what_onnx_runtime_says_is_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its library writes to the process's standard error itself, in colours and with the names of the model."""
    name, path = HOSTILE["colours"], tmp_path / "model.onnx"
    model = onnx.parser.parse_model(RESHAPE)
    model.graph.node[0].name = name
    path.write_bytes(model.SerializeToString())
    wrong = np.ones(5, np.float32)
    with pytest.raises(Exception, match="Reshape"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": wrong})
    assert name in capfd.readouterr().err  # what a user would see
    with pytest.raises(SqatError) as error:
        open_artifact(path)(Batch({"x": torch.from_numpy(wrong)}, torch.zeros(5), torch.zeros(5)))
    printing.print_error(error.value)
    output, line = capfd.readouterr()
    assert output == ""
    assert_safe(line, name, lines=1)
    with pytest.raises(SqatError, match="reads the input 'x'"):
        open_artifact(path)(Batch({"z": torch.from_numpy(wrong)}, torch.zeros(5), torch.zeros(5)))


RESHAPE = """<ir_version: 9, opset_import: ["" : 17]>
agraph (float[n] x) => (float[a] y) <int64[1] s = {3}> { y = Reshape(x, s) }"""


def test_files_from_outside_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = "text\x1b]0;owned\x07\u202e"
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / "data\x1b[31m.csv"
    path.write_text(f"{column},label\na b,x\nc d,y\n")
    assert main(["init", str(path), "--task", "classification", "--output", str(tmp_path / "x" / "r.yaml")]) == 0
    captured = capsys.readouterr()
    assert r"text\x1b]0;owned\x07\u202e" in captured.out
    assert main(["init", str(path), "--task", "\x1b[31mred"]) == 2
    assert main(["run", "no\x1b[31m\nsuch.yaml"]) == 2
    assert main(["run", "--\x1b[31m"]) == 2
    assert main(["\x1b[31m"]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 4
    assert not RAW & set(captured.out + captured.err + error) - {"\n"}


@pytest.mark.parametrize("columns", ["0", "1", "10", "-5", "abc", "²", "", "99999999999999999999"])
@pytest.mark.parametrize("line", ["doctor", "--help", "run --help", "run nowhere.yaml"])
def test_every_width_prints_everything(
    line: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code = main(line.split())
    expected = capsys.readouterr()
    monkeypatch.setenv("COLUMNS", columns)
    assert main(line.split()) == code
    captured = capsys.readouterr()
    assert len("".join(captured.out.split())) >= 0.7 * len("".join(expected.out.split()))
    assert "".join(captured.err.split()) == "".join(expected.err.split())


def test_a_terminal_of_one_column(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback=(80, 24): __import__("os").terminal_size((1, 1)))
    assert main(["doctor"]) == 0
    assert printing.result_console().width == MIN_WIDTH
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) > 10
    monkeypatch.delenv("COLUMNS", raising=False)


def test_an_encoding_that_lacks_a_character(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqat", "run", "nö-日本.yaml"]
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert process.returncode == 2
    assert rb"n\xf6-\u65e5\u672c.yaml" in process.stderr


def test_a_plain_console_is_what_it_guards_against() -> None:
    file = io.StringIO()
    Console(file=file, force_terminal=True).print(Text("\u202e"))
    assert "\u202e" in file.getvalue()
