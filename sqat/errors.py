"""The exceptions that a user sees: where, what is wrong, and what to do.

A user's mistake is a SqatError, a broken contract inside sqat a ValueError. Only the command line exits.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Literal
from unicodedata import category

ErrorCode = Literal[
    "usage",  # an option or an argument is wrong, or two exclude each other
    "unknown-name",  # a name is not one of the allowed names
    "missing-file",  # a path does not exist
    "unreadable-file",  # a file cannot be read, or has another format than its name says
    "unwritable-file",  # a file or folder cannot be written
    "output-exists",  # the output exists already
    "invalid-recipe",  # a key, type or value of a recipe is not allowed
    "recipe-conflict",  # two parts of a recipe exclude each other
    "invalid-data",  # a row, column or label is wrong
    "no-rows",  # a split, a sample or a batch is empty
    "not-a-checkpoint",  # a folder holds no checkpoint, or one without torch weights
    "damaged-checkpoint",  # a digest, shape, mask or amax is not what the manifest says
    "newer-format",  # a newer sqat wrote the file
    "stale-checkpoint",  # the recipe has changed since the checkpoint was written
    "stage-order",  # a stage needs another stage before it, or cannot follow one
    "unsupported-model",  # sqat cannot load, prune, quantize or distil the model
    "model-mismatch",  # weights, config, head or tokenizer do not belong together
    "no-layer",  # a glob or a name selects no layer
    "unsupported-target",  # an export target cannot express the model or the recipe
    "invalid-onnx",  # an ONNX graph breaks ONNX's own rules
    "broken-rule",  # an exported file breaks a rule of its target
    "parity",  # an exported file does not compute what the torch model computes
    "missed-gate",  # a stage's result misses a quality gate
    "dense-layer",  # an engine runs a sparse layer as a dense one
    "missing-package",  # an optional package is not installed
    "missing-hardware",  # this machine cannot run it
    "non-finite",  # NaN or Inf in a loss, a gradient, a scale or a statistic
    "locked",  # another run holds the folder
    "lost-process",  # another process has ended or does not answer
    "stopped",  # the user or the system stops the run
]


class SqatError(Exception):
    """A user's mistake in a recipe, data, checkpoint or option, reported in one line.

    Args:
        problem: what is wrong and what is allowed, without a full stop.
        hint: what to do; empty if the problem says it.
        place: where, e.g. ``recipe.yaml:12`` or ``train.jsonl.gz:7``; may be empty.
        code: the type of the mistake; tests and callers compare it, not the wording.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = "", place: str = "", *, code: ErrorCode) -> None:
        super().__init__(problem)
        self.problem = escape_control(problem)
        self.hint = escape_control(hint)
        self.place = escape_control(place)
        self.code = code

    def __str__(self) -> str:
        line = f"{self.place}: {self.problem}" if self.place else self.problem
        return f"{line}; {self.hint}" if self.hint else line


class GateError(SqatError):
    """The result of the work misses a quality gate."""

    exit_code = 3


class StoppedError(SqatError):
    """The user or the system has stopped a run, which has saved its state."""

    exit_code = 130


def escape_control(text: str) -> str:
    """Escape what moves a cursor, breaks a line, reverses or hides text: names come from users' files.

    Spaces of any width stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message that is not empty, or else the class name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(got: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the name nearest to one that was got; empty without one. Names of strangers may be many and long."""
    short = [name for name in islice(names, 1000) if len(name) <= 100]
    return next(iter(get_close_matches(got, short, n=1, cutoff=cutoff)), "") if len(got) <= 100 else ""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Return a hint with the nearest of the allowed names, and all of them."""
    names = list(allowed)
    close = get_close_matches(got.lower(), names, n=1, cutoff=0.6)
    close = close or [name for name in names if len(got) > 3 and got.lower() in name]  # part of a longer name
    listed = f"allowed: {', '.join(names)}" if names else ""
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def suggest_file(path: Path) -> str:
    """Return a hint that names the file nearest to a missing one."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    close = get_close_matches(path.name, names, n=1)
    recipes = [name for name in names if name.endswith(tuple(path.suffixes[:1]) or (".yaml", ".yml"))]
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"{folder} holds {', '.join(recipes[:5])}" if recipes else f"{folder.resolve()} holds no similar file"
