"""The one exception a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


class SqatError(Exception):
    """A user's mistake (recipe, data, checkpoint, flag), told in one line.

    Args:
        problem: what was got and what is allowed, one sentence without a full stop.
        hint: what to do about it; empty where the problem says it all.
        place: where, e.g. ``recipe.yaml:12`` or ``train.jsonl.gz:7``; empty for a flag.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = "", place: str = "") -> None:
        super().__init__(problem)
        self.problem = printable(problem)
        self.hint = printable(hint)
        self.place = printable(place)

    def __str__(self) -> str:
        line = f"{self.place}: {self.problem}" if self.place else self.problem
        return f"{line}; {self.hint}" if self.hint else line


class GateError(SqatError):
    """The work was done but its result missed a quality gate."""

    exit_code = 3


class StoppedError(SqatError):
    """The user or the system asked a run to stop, and it has saved what it had."""

    exit_code = 130


def printable(text: str) -> str:
    """Text whose line breaks and control characters are written as Python writes them: names come from users' files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """First line of a library's message that says anything; the class's name where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def near_files(path: Path) -> str:
    """A hint that names the nearest file to one that is not there."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    close = get_close_matches(path.name, names, n=1)
    recipes = [name for name in names if name.endswith(tuple(path.suffixes[:1]) or (".yaml", ".yml"))]
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"{folder} holds {', '.join(recipes[:5])}" if recipes else f"nothing like it is in {folder.resolve()}"
