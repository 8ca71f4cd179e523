"""The process that tries inputs one by one, and says what became of each.

Reads kind and number of an input from standard input, and answers with a line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.faults.fuzzing.case import Action
from scripts.faults.fuzzing.generators import GENERATORS
from scripts.faults.fuzzing.warm import warm
from sqat.cli.exit_codes import run_app
from sqat.errors import SqatError

MEMORY = 16 << 30  # bytes of address space: an input that asks for more gets a MemoryError
SECRETS = ("secret", "hostname")  # files beside and far from the input that nothing may open
INPUT_FOLDER, TEMPORARY_FOLDER = "inside", "temporary"
BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the order of what is shown
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATH_EVENTS = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.truncate": (0,),
               "os.link": (1,), "os.symlink": (1,), "shutil.rmtree": (0,)}  # fmt: skip


def main() -> None:
    seed, place = sys.argv[1], Path(sys.argv[2]).resolve()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    (place / TEMPORARY_FOLDER).mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = os.environ["MPLCONFIGDIR"] = str(place / TEMPORARY_FOLDER)
    watch = Watch(place)
    sys.addaudithook(watch.see)
    warm()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        kind, number = line.split()
        answers.write(json.dumps(try_input(kind, seed, int(number), place, watch)) + "\n")
        answers.flush()


@dataclass
class Watch:
    """Sees which files Python code opens, and what it writes outside the input's folder and temporary folders."""

    place: Path
    seen: list[str] = field(default_factory=list)
    is_active: bool = False

    def see(self, event: str, given: tuple[Any, ...]) -> None:
        """Note a forbidden access (an audit hook)."""
        if not self.is_active:
            return
        if event == "open" and isinstance(given[0], str | bytes):
            path = os.fsdecode(given[0])
            if path.endswith(SECRETS):
                self.seen.append(f"opened {path}")
            if given[2] & WRITES and not self.is_allowed(path):
                self.seen.append(f"wrote {path}")
        elif event in PATH_EVENTS:
            paths = [
                os.fsdecode(given[i]) for i in PATH_EVENTS[event] if isinstance(given[i], str | bytes | os.PathLike)
            ]
            self.seen += [f"{event} {path}" for path in paths if not self.is_allowed(path)]

    def is_allowed(self, path: str) -> bool:
        """Tell whether something may be written at a path."""
        whole = os.path.realpath(os.path.dirname(os.path.abspath(path)))
        roots = (str(self.place / INPUT_FOLDER), str(self.place / TEMPORARY_FOLDER), "/dev", "/proc")
        # Python's caches, and what libraries keep in the user's cache folder.
        is_folder = os.path.realpath(path) in roots  # `mkdir` of a folder that exists
        return is_folder or whole.startswith(roots) or "__pycache__" in path or "/.cache/" in path


def try_input(kind: str, seed: str, number: int, place: Path, watch: Watch) -> dict[str, str]:
    """Make an input and try its actions; the first wrong answer is the outcome."""
    folder = place / INPUT_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (place / "secret").write_text("not for you")
    os.chdir(folder)
    actions = GENERATORS[kind].load()(random.Random(f"{seed} {kind} {number}"), folder)
    outcome, tried = "accepted", ""
    for action in actions:
        before, watch.seen, watch.is_active = list_outside(place), [], True
        answer = try_action(action)
        watch.is_active = False
        os.chdir(folder)
        if watch.seen:
            answer = watch.seen[0]
        elif list_outside(place) != before:
            answer = "changed files outside the input's folder"
        tried = action_name(action)
        if answer not in ("accepted", "refused"):
            return {"outcome": answer[:300], "action": tried}
        outcome = "refused" if answer == "refused" else outcome
    return {"outcome": outcome, "action": tried}


def action_name(action: Action) -> str:
    """Describe an action in a line."""
    return "" if callable(action) else " ".join(action)


def list_outside(place: Path) -> list[tuple[str, int, int]]:
    """List name, size and time of the files beside the input's folder."""
    entries = [entry for entry in os.scandir(place) if entry.name not in (INPUT_FOLDER, TEMPORARY_FOLDER)]
    return sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)


def try_action(action: Action) -> str:
    """Return ``accepted``, ``refused``, or what else became of one action."""
    return try_function(action) if callable(action) else try_command(action)


def try_function(function: Callable[[], object]) -> str:
    """Call a function of the package."""
    try:
        function()
    except SqatError as error:
        return "refused" if "\n" not in str(error) and error.exit_code == 2 else f"not one line: {error!r}"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def try_command(argv: Sequence[str]) -> str:
    """Run a command line of sqat in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = Path(scratch) / "output", Path(scratch) / "errors"
        try:
            with capture_output(*paths):
                code = run_app(list(argv))
        except BaseException as error:
            return f"{type(error).__name__} leaves the command: {error}"
        text, errors = (path.read_bytes().decode("utf-8", "surrogateescape") for path in paths)
    return judge(code, text, errors)


def judge(code: int, text: str, errors: str) -> str:
    """Return ``accepted``, ``refused``, or what is wrong with a command's answer."""
    raw = next((c for c in text + errors if is_raw(c)), None)
    if raw is not None:
        return f"raw control character {raw!r}"
    if "Traceback (most recent call last)" in errors:
        return "traceback"
    if code not in (0, 2, 3):
        return f"exit code {code}: {(errors.strip().splitlines() or ['nothing'])[-1]}"
    if code and "error: " not in errors:
        return f"exit code {code} without an error line"
    return "refused" if code else "accepted"


def is_raw(character: str) -> bool:
    """Tell whether a terminal may obey a character, or print it as no character at all."""
    if character in "\n\t":
        return False
    return character in BIDIRECTIONAL or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


@contextmanager
def capture_output(*paths: Path) -> Iterator[None]:
    """Send standard output and error, also those of C libraries, to two files."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in paths]
    os.dup2(files[0], 1), os.dup2(files[1], 2)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
        for handle in (*files, *kept):
            os.close(handle)


if __name__ == "__main__":
    main()
