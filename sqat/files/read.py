"""The door for files that are read.

A file is a regular one of a bounded size: a pipe, a device or a folder is refused at once and never blocks. Text is
UTF-8, JSON has a bounded depth. Inside a folder that sqat wrote, links are not followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from sqat.errors import SqatError, suggest_file

MEGABYTE = 1 << 20
MAX_BYTES = 1024 * MEGABYTE  # of a file that is read whole
MAX_JSON = 64 * MEGABYTE
MAX_DEPTH = 100  # of JSON: lists and objects within each other
MAX_DIGITS = 300  # of a whole number: a float holds 308
# Without O_NONBLOCK, the open itself waits for the writer of a pipe. Windows has neither pipe nor flag.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def open_file(path: Path, *, place: str = "", root: Path | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        place: what messages call the file; default: its path.
        root: folder that sqat wrote and that holds the file; no link below it is followed.

    Raises:
        SqatError: the file is missing, no regular file, a link below the root, or not readable.
    """
    place = place or str(path)
    try:
        if root is not None and (link := find_link(path, root)) is not None:
            problem = "is a link, and sqat follows no links inside its own folders"
            raise SqatError(problem, "put the file itself there", str(link), code="unreadable-file")
        handle = os.open(path, FLAGS | (NO_FOLLOW if root is not None else 0))
    except FileNotFoundError as error:
        raise SqatError("no such file", suggest_file(path), place, code="missing-file") from error
    except (OSError, ValueError) as error:  # ValueError: NUL or half a surrogate pair in the path
        raise cannot_read(error, place) from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        problem = f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file"
        raise SqatError(problem, "name a file", place, code="unreadable-file")
    return os.fdopen(handle, "rb")


def is_file(path: Path) -> bool:
    """Say whether a path is a regular file; never fails, whatever the name."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def find_link(path: Path, root: Path) -> Path | None:
    """Return the first link on the way from a folder to a path in it; the folder itself may be one."""
    parts = path.relative_to(root).parts
    steps = [root.joinpath(*parts[: number + 1]) for number in range(len(parts))]
    return next((step for step in steps if step.is_symlink()), None)


def read_bytes(path: Path, *, limit: int = MAX_BYTES, place: str = "", root: Path | None = None) -> bytes:
    """Read a file whole.

    Args:
        limit: bytes that such a file has at most.
        place, root: see `open_file`.

    Raises:
        SqatError: see `open_file`; or the file is larger than the limit.
    """
    place = place or str(path)
    with open_file(path, place=place, root=root) as file:
        try:
            content = file.read() if os.fstat(file.fileno()).st_size <= limit else None
        except OSError as error:
            raise cannot_read(error, place) from error
        except MemoryError as error:
            raise SqatError("is larger than the memory", place=place, code="unreadable-file") from error
    if content is None or len(content) > limit:  # a file of /proc says 0, and a file may grow
        size = f"{limit / MEGABYTE:g} MB" if limit >= MEGABYTE else f"{limit} bytes"
        raise SqatError(f"is larger than {size}, which no such file is", "name another file", place,
                        code="unreadable-file")  # fmt: skip
    return content


def read_text(path: Path, *, limit: int = MAX_BYTES, place: str = "", root: Path | None = None) -> str:
    """Read a UTF-8 file whole, without its byte order mark.

    Raises:
        SqatError: see `read_bytes`; or the line that is not UTF-8.
    """
    return decode(read_bytes(path, limit=limit, place=place, root=root), place or str(path))


def read_json(path: Path, *, limit: int = MAX_JSON, place: str = "", root: Path | None = None) -> Any:
    """Read a JSON file.

    Raises:
        SqatError: see `read_text` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit=limit, place=place, root=root), place or str(path))


def try_read_object(path: Path, *, root: Path | None = None) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is absent, damaged or holds something else."""
    try:
        parsed = read_json(path, root=root)
    except SqatError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def parse_json(content: bytes | str, place: str) -> Any:
    """Parse JSON.

    Raises:
        SqatError: it is not JSON, too deep, or holds a number or a text that nothing can store.
    """
    text = decode(content, place) if isinstance(content, bytes) else content
    try:
        value = json.loads(text, parse_int=parse_whole)
        if r"\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        check_depth(value)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise SqatError(f"is not JSON: {where}", "write it again", place, code="unreadable-file") from error
    except UnicodeEncodeError as error:
        problem = f"holds half a character: \\u{ord(error.object[error.start]):04x} stands alone"
        raise SqatError(problem, "write both halves, or none", place, code="unreadable-file") from error
    except RecursionError as error:
        problem = f"holds lists and objects more than {MAX_DEPTH} deep"
        raise SqatError(problem, "write it flatter", place, code="unreadable-file") from error
    except ValueError as error:
        raise SqatError(f"is not JSON: {error}", "write it again", place, code="unreadable-file") from error
    return value


def parse_whole(digits: str) -> int:
    """Parse a whole number that a float can hold."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_depth(value: Any) -> None:
    """Raise RecursionError for lists and objects that are too deep for whoever walks them."""
    level, depth = containers([value]), 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        level = containers(child for each in level for child in (each.values() if isinstance(each, dict) else each))


def containers(values: Iterable[Any]) -> list[Any]:
    """Keep the lists and objects."""
    return [value for value in values if isinstance(value, dict | list)]


def decode(content: bytes, place: str) -> str:
    """Decode UTF-8 with or without a byte order mark.

    Raises:
        SqatError: the line that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 text: byte 0x{content[error.start]:02x}"
        raise SqatError(problem, "save it as UTF-8", f"{place}:{line}", code="unreadable-file") from None


def cannot_read(error: Exception, place: str) -> SqatError:
    """Make the error for a file that the system does not give."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SqatError(f"cannot be read: {reason}", "check its path and permissions", place, code="unreadable-file")
