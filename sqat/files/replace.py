"""The door for files that are replaced: whole or not at all, so that they stay after a power cut.

Only what sqat wrote is replaced or deleted: a folder whose manifest names every file in it, a file with our mark. No
link is followed on the way.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from sqat.errors import SqatError
from sqat.files.read import FLAGS, NO_FOLLOW, try_read_object

UNFINISHED = ".sqat-unfinished"  # in a folder that is being written
DESKTOP = (".DS_Store", "Thumbs.db")  # whoever looks into a folder leaves them there
LINK = "is a link, and sqat follows no links inside its own folders"
MOVE = "move it away, or choose another output"
MOVE_FILES = "move what is yours out of the folder, which is replaced as a whole, or choose another output"
SHOWN = 3  # files in a message


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file, or one of ours again, and wait until it is on the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_FOLLOW, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it; create missing folders.

    Raises:
        SqatError: the file cannot be written; what was there stays.
    """
    fresh = path.with_name(f".sqat-{secrets.token_hex(8)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(fresh, content)
        fresh.replace(path)
    except (OSError, ValueError) as error:  # ValueError: NUL or half a surrogate pair in the path
        with suppress(OSError, ValueError):
            fresh.unlink()
        raise cannot_write(error, path) from error


def open_own(path: Path, flags: int) -> int:
    """Open or create a file of a run folder that sqat writes in place; return its handle.

    Raises:
        SqatError: it is a link or has a second name, so that another file would change; or it is no file.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, flags | os.O_CREAT | FLAGS | NO_FOLLOW, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # Linux; FreeBSD
            raise not_ours(path, LINK) from error
        if error.errno == errno.ENXIO:
            raise not_ours(path, "is a pipe or a socket, not a file") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        problem = "is a pipe or a device, not a file"
    elif status.st_nlink > 1:
        problem = "is a hard link, so that sqat would change another file as well"
    else:
        return handle
    os.close(handle)
    raise not_ours(path, problem)


def append_text(path: Path, text: str) -> None:
    """Append to a file of a run folder.

    Raises:
        SqatError: see `open_own`.
        OSError: it cannot be written.
    """
    with open(open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(text.encode(errors="backslashreplace"))


def check_place(path: Path, kind: Literal["file", "folder"]) -> None:
    """Refuse a place in a run folder that holds a link or another kind of thing.

    Raises:
        SqatError: it says what lies there.
    """
    if path.is_symlink():
        raise not_ours(path, LINK)
    is_kind = path.is_file() and path.stat().st_nlink == 1 if kind == "file" else path.is_dir()
    if path.exists() and not is_kind:
        raise not_ours(path, f"is no {kind} of sqat")


def make_folder(path: Path) -> None:
    """Create a folder for files of ours, if it is missing.

    Raises:
        SqatError: it is a link, or no folder.
        OSError: it cannot be created.
    """
    check_place(path, "folder")
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replace_directory(directory: Path, mark: str) -> Iterator[Path]:
    """Give an empty folder to write into; at the end, sync it and rename it to ``directory``.

    A folder whose manifest cannot be read is set aside as ``NAME.damaged``.

    Args:
        mark: name of the manifest, whose ``files`` are the other files.

    Raises:
        SqatError: there is something that sqat did not write, or the folder cannot be written; what was there stays.
    """
    fresh, previous, aside = siblings(directory)
    check_replaceable(directory, mark)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        clean_up(directory, mark)
        fresh.mkdir()
        write_synced(fresh / UNFINISHED, b"")
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        check_replaceable(directory, mark)
        (fresh / UNFINISHED).unlink()
        if directory.exists():
            directory.rename(aside if is_damaged(directory, mark) else previous)
        fresh.rename(directory)
        sync(directory.parent)
    except OSError as error:
        raise cannot_write(error, directory) from error
    finally:
        clean_up(directory, mark)


def siblings(directory: Path) -> tuple[Path, Path, Path]:
    """Return the places beside a folder: while it is written, what it replaces, and a damaged one set aside."""
    name = directory.name
    return (directory.with_name(f".{name}.new"), directory.with_name(f".{name}.old"),
            directory.with_name(f"{name}.damaged"))  # fmt: skip


def clean_up(directory: Path, mark: str) -> None:
    """Restore the previous folder if a write ended between its two renames, and delete leftovers."""
    fresh, previous, _ = siblings(directory)
    if previous.exists() and not directory.exists():
        with suppress(OSError):
            previous.rename(directory)
    for leftover in (fresh, previous):
        remove_folder(leftover, mark)


def remove_folder(directory: Path, mark: str) -> None:
    """Delete a folder in which all is ours; leave any other."""
    if not find_foreign(directory, mark):
        shutil.rmtree(directory, ignore_errors=True)


def check_replaceable(directory: Path, mark: str) -> None:
    """Refuse a place where something lies that sqat did not write.

    Raises:
        SqatError: it says what lies there.
    """
    fresh, previous, aside = siblings(directory)
    damaged = is_damaged(directory, mark)
    for place in (fresh, previous) if damaged else (directory, fresh, previous):
        if problem := find_foreign(place, mark):
            is_folder = place.is_dir() and not place.is_symlink()
            raise not_ours(place, problem, MOVE_FILES if is_folder else MOVE)
    if damaged and os.path.lexists(aside):
        raise not_ours(aside, f"exists, so that {directory.name}, whose {mark} is damaged, cannot be set aside")


def find_foreign(directory: Path, mark: str) -> str:
    """Say what in a place sqat did not write; empty where all is ours, or nothing is there."""
    if directory.is_symlink():
        return LINK
    if not directory.exists():
        return ""
    if not directory.is_dir():
        return "is a file that sqat did not write"
    names = set(list_files(directory))
    if UNFINISHED in names or names <= {mark}:
        return ""
    listed = try_read_object(directory / mark, root=directory).get("files")
    foreign = sorted(names - {mark, *(listed if isinstance(listed, dict) else ())})
    others = f" and {len(foreign) - SHOWN} more" if len(foreign) > SHOWN else ""
    return f"holds {', '.join(foreign[:SHOWN])}{others}, which sqat did not write there" if foreign else ""


def is_damaged(directory: Path, mark: str) -> bool:
    """Whether a folder has a manifest of ours that does not say which files belong to it."""
    if directory.is_symlink() or (directory / mark).is_symlink() or not (directory / mark).is_file():
        return False
    return not isinstance(try_read_object(directory / mark, root=directory).get("files"), dict)


def list_files(directory: Path) -> Iterator[str]:
    """Yield the relative names of files, and of links, below a folder."""
    for folder, folders, files in os.walk(directory):
        where = Path(folder)
        linked = [name for name in folders if (where / name).is_symlink()]
        for name in (*files, *linked):
            if name not in DESKTOP:
                yield (where / name).relative_to(directory).as_posix()


def not_ours(place: Path, problem: str, hint: str = MOVE) -> SqatError:
    """Make the error for something that sqat did not write and does not touch."""
    return SqatError(problem, hint, str(place), code="output-exists")


def cannot_write(error: Exception, path: Path) -> SqatError:
    """Make the error for a file or folder that the system does not let us write."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SqatError(f"cannot be written: {reason}", "free space, or choose another place", str(path),
                     code="unwritable-file")  # fmt: skip
