"""What a person sees in a terminal of 80 x 24: the recorded session, colours, progress, and errors that fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.script_loader import load_script

if sys.platform == "win32":
    pytest.skip("no pseudo-terminals", allow_module_level=True)

session = load_script("record_session")
RECORDED = Path(__file__).parents[2] / "recipes/figures/session.txt"
COLOUR = re.compile(r"\x1b\[[\d;]*(3[0-8]|9[0-7])[\d;]*m")
FIGURE = re.compile(r"(?<=data )[0-9a-f]+(?=,)|\d+(\.\d+)?(e-?\d+)?|inf")  # a digest of compressed files is zlib's too
MISTAKES = {
    "no such recipe": ("run", "missing.yaml"),
    "an unknown flag": ("run", "r.yaml", "--qiet"),
    "an unknown command": ("trian", "r.yaml"),
    "no recipe named": ("run",),
    "many unknown keys": ("run", "r.yaml"),
    "not YAML": ("run", "broken.yaml"),
    "no run": ("report", "nowhere"),
    "no data": ("init", "rows.jsonl"),
}


def test_a_screen_is_what_remains() -> None:
    drawn = "\x1b[?25l\x1b[1mtrain\x1b[0m 1/2\r\n  loss=1\r\x1b[2K\x1b[1A\x1b[2Ktrain 2/2\r\n\x1b[?25hdone\r\n"
    assert session.screen(drawn) == ["train 2/2", "done"]
    assert session.screen("x" * 81 + "\r\n") == ["x" * 80, "x"]
    assert session.screen("abc\rx") == ["xbc"]
    with pytest.raises(ValueError, match="not understood"):
        session.screen("\x1b[5;5H")


def shapes(text: str) -> list[str]:
    """Each command's words without what differs between machines: figures, and where lines and rules end for them."""
    plain = re.sub("─+", "---", FIGURE.sub("#", text))
    return [" ".join(command.split()) for command in re.split(r"^\$ ", plain, flags=re.MULTILINE)]


@pytest.mark.pipeline
def test_the_recorded_session_is_what_sqat_shows(tmp_path: Path) -> None:
    session.prepare(tmp_path)
    shown = [line for words in session.SESSION for line in session.record(tmp_path, words)]
    assert shapes("\n".join(shown)) == shapes(RECORDED.read_text(encoding="utf-8"))
    assert max(len(line) for line in shown if not line.startswith("$")) <= session.COLUMNS
    log = (tmp_path / "runs/digits/sqat.log").read_text()
    assert "train: 40/40, task " in log
    assert not set(log) & {"\x1b", "\r", "\b"}, "a log is plain lines, whatever the terminal showed"


def test_the_readme_of_recipes_shows_the_session() -> None:
    text = (RECORDED.parents[1] / "README.md").read_text()
    assert "figures/session.txt" in text
    first = RECORDED.read_text(encoding="utf-8").split("\n\n$")[0].strip()
    assert first in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistakes")
    keys = "".join(f"  a-key-that-nobody-knows-{number}: {{epochs: 1, unknown: 2}}\n" for number in range(40))
    (path / "r.yaml").write_text(f"model: {{source: m}}\ntask: classification\nstages:\n{keys}")
    (path / "broken.yaml").write_text("model: [\n" * 40)
    (path / "rows.jsonl").write_text("{not json\n" * 40)
    return path


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_errors_fit_a_screen(folder: Path, words: tuple[str, ...]) -> None:
    code, drawn = session.in_terminal([sys.executable, "-m", "sqat", *words], folder)
    lines = session.screen(drawn)
    assert code == 2
    assert 0 < len(lines) < session.LINES
    assert max(len(line) for line in lines) <= session.COLUMNS
    assert "Traceback" not in drawn


def test_colours_are_for_terminals_that_want_them(folder: Path) -> None:
    command = [sys.executable, "-m", "sqat", "run", "missing.yaml"]
    assert COLOUR.search(session.in_terminal(command, folder)[1])
    assert not COLOUR.search(session.in_terminal(command, folder, NO_COLOR="1")[1])
    assert "\x1b" not in session.in_terminal(command, folder, TERM="dumb")[1]
    piped = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=session.environment({}), check=False
    )
    assert piped.returncode == 2
    assert "\x1b" not in piped.stdout + piped.stderr
    assert len(piped.stderr.splitlines()) == 1
