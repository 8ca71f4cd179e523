"""The one exception a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

ErrorCode = Literal[
    "unclassified",
    "usage",  # a flag or an argument is wrong, or two exclude each other
    "unknown-name",  # a name is none of those allowed
    "missing-file",  # a path does not exist
    "unreadable-file",  # a file cannot be read, or is not of the format that it claims
    "unwritable-file",  # a file or folder cannot be written
    "output-exists",  # something else is where the output should go
    "invalid-recipe",  # a key, type or value of a recipe is not allowed
    "recipe-conflict",  # parts of a recipe do not fit each other
    "invalid-data",  # a row, column or label is wrong
    "no-rows",  # a split, a sample or a batch holds nothing to work on
    "not-a-checkpoint",  # the folder holds no checkpoint, or one without torch weights
    "damaged-checkpoint",  # a digest, shape, mask or amax is not what the manifest says
    "newer-format",  # a file was written by a newer sqat
    "stale-checkpoint",  # the recipe would not make this checkpoint any more
    "stage-order",  # a stage needs another stage before it, or must not follow one
    "unsupported-model",  # the model cannot be loaded, pruned, quantized or distilled
    "model-mismatch",  # weights, config, head or tokenizer do not belong together
    "no-layer",  # a glob or a name selects no layer
    "unsupported-target",  # an export target cannot express the model or the recipe
    "invalid-onnx",  # an ONNX graph breaks ONNX's own rules
    "broken-rule",  # an exported file breaks a rule of its target
    "parity",  # an exported file does not compute what the torch model computes
    "missed-gate",  # a stage's result misses a quality gate
    "dense-layer",  # an engine runs a layer dense that should run sparse
    "missing-package",  # an optional package is not installed
    "missing-hardware",  # this machine cannot run what was asked for
    "non-finite",  # NaN or Inf in a loss, a gradient, a scale or a statistic
    "locked",  # another run holds the folder
    "lost-process",  # another process of a distributed run has ended
    "stopped",  # the user or the system asked the run to stop
]


class SqatError(Exception):
    """A user's mistake (recipe, data, checkpoint, flag), reported in one line.

    Args:
        problem: what is wrong and what is allowed, one sentence without a full stop.
        hint: what to do about it; empty where the problem says it all.
        place: where, e.g. ``recipe.yaml:12`` or ``train.jsonl.gz:7``; empty for a flag.
        code: the kind of the mistake; tests and callers compare it, never the wording.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = "", place: str = "", *, code: ErrorCode = "unclassified") -> None:
        super().__init__(problem)
        self.problem = printable(problem)
        self.hint = printable(hint)
        self.place = printable(place)
        self.code = code

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


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Return a hint with the nearest of the allowed names, and all of them."""
    names = list(allowed)
    close = get_close_matches(got.lower(), names, n=1, cutoff=0.6)
    close = close or [name for name in names if len(got) > 3 and got.lower() in name]  # part of a longer name
    listed = f"allowed: {', '.join(names)}" if names else ""
    return f"did you mean {close[0]!r}? {listed}" if close else listed


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
