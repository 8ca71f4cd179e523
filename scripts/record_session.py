"""Record what a terminal shows of the commands of a session, for recipes/figures/session.txt.

    .venv/bin/python scripts/record_session.py [--output recipes/figures/session.txt]

Every command runs in a pseudo-terminal of 80 x 24, in a new folder with the digits of scikit-learn; `screen` is what is
left to see at its end: a progress bar that has gone is not in it. Tests run `SESSION` again and compare the lines
but for their figures, which change with the machine. Left out: colours; the moving bar on its way.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

ROOT = Path(__file__).parents[1]
COLUMNS, LINES = 80, 24
STEPS = ("--set", "stages.train.epochs=null", "--set", "stages.train.steps=40")
SESSION = (
    ("run", "digits.yaml", "--to", "dense", *STEPS),
    ("run", "digits.yaml", "--to", "dense", *STEPS),
    ("run", "digits.yaml", "--set", "stages.trian.steps=40"),
)
PIECE = re.compile(r"\x1b\[(?P<number>[\d;?]*)(?P<command>[A-Za-z])|(?P<control>[\r\n\b])|(?P<text>[^\x1b\r\n\b]+)")


def in_terminal(command: Sequence[str], folder: Path, **more: str) -> tuple[int, str]:
    """Run a command in a pseudo-terminal of 80 x 24: its exit code and every byte it drew.

    Args:
        more: of the environment.
    """
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment(more))
    os.close(theirs)
    drawn = bytearray()
    try:
        while piece := read_some(ours):
            drawn += piece
    finally:
        os.close(ours)
    return process.wait(), drawn.decode()


def read_some(descriptor: int) -> bytes:
    """What has come; nothing when the other end is closed, which Linux says by an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """That of a plain terminal: nothing that forces or forbids colours or a width."""
    forced = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in forced}
    paths = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH", ""))))
    return kept | {"TERM": "xterm-256color", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **more}


def screen(drawn: str) -> list[str]:
    """The lines that remain, wrapped as a terminal wraps them: of its language what Rich speaks and no more.

    Raises:
        ValueError: something else was drawn.
    """
    lines, row, column, end = [""], 0, 0, 0
    for piece in PIECE.finditer(drawn):
        if piece.start() != end:
            raise ValueError(f"not understood: {drawn[end : piece.start()]!r}")
        end = piece.end()
        if piece["text"]:
            for letter in piece["text"]:
                if column == COLUMNS:
                    row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
                column += 1
        elif piece["control"]:
            row, column = (row + 1, 0) if piece["control"] == "\n" else (row, max(column - 1, 0) * (piece[0] == "\b"))
        elif piece["command"] == "A":
            row = max(row - int(piece["number"] or 1), 0)
        elif piece["command"] == "K":
            lines += [""] * (row + 1 - len(lines))
            lines[row] = "" if piece["number"] == "2" else lines[row][:column]
        elif piece["command"] not in "mhl":
            raise ValueError(f"not understood: {piece[0]!r}")
    return [line.rstrip() for line in lines]


def prepare(folder: Path) -> None:
    """The recipe and its data in a folder, as a user's own: `digits.yaml`, `digits/*.npz`."""
    subprocess.run([sys.executable, str(ROOT / "scripts/digits.py"), "--output", str(folder / "digits")], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    recipe = (ROOT / "recipes/digits.yaml").read_text()
    (folder / "digits.yaml").write_text(recipe.replace("../runs/digits/", "digits/"))


def record(folder: Path, words: Sequence[str]) -> list[str]:
    """One command with its prompt and what is left to see of it."""
    _, drawn = in_terminal([sys.executable, "-m", "sqat", *words], folder)
    return [f"$ sqat {' '.join(words)}", *"\n".join(screen(drawn)).rstrip().splitlines(), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/figures/session.txt")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        lines = [line for words in SESSION for line in record(folder, words)]
    output.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
