"""Where a command may write its result: never over a file of a checkpoint, or one that no such command made."""

from __future__ import annotations

from pathlib import Path

from sqat.checkpoint.manifest import MANIFEST
from sqat.errors import SqatError
from sqat.files.read import read_bytes, try_read_object

MADE_BY = "made by sqat"  # stands in every page, picture and JSON file that a command writes
DEEPEST = 3  # levels of a checkpoint's folders
PLOTS = (".png", ".svg", ".pdf")


def check_output(path: Path | None, *endings: str, force: bool = False) -> None:
    """Refuse a place for a result before the work begins; None is no place.

    Args:
        endings: that the file's name may have.
        force: the user allows to replace any file of such a name.

    Raises:
        SqatError: the name has another ending, the place is in a checkpoint, or holds something else than a result.
    """
    if path is None:
        return
    if path.is_dir():
        raise SqatError("is a folder", "name a file", str(path), code="unwritable-file")
    if path.suffix.lower() not in endings:
        problem = f"the result is not written to a {path.suffix or 'file without an ending'}"
        raise SqatError(problem, f"name a {' or '.join(endings)} file", str(path), code="usage")
    for folder in list(path.absolute().parents)[:DEEPEST]:
        if "files" in try_read_object(folder / MANIFEST):
            hint = "name a file outside it"
            raise SqatError("lies in a checkpoint, which holds no other files", hint, str(path), code="output-exists")
    if path.exists() and not force and not is_result(path):
        problem = f"exists, and does not say that it was {MADE_BY}"
        raise SqatError(problem, "move it away, or name another file", str(path), code="output-exists")


def is_result(path: Path) -> bool:
    """Whether a command of sqat wrote a file."""
    try:
        return MADE_BY.encode() in read_bytes(path)
    except SqatError:
        return False
