"""The door for files that are replaced: whole or not at all, so that they stay after a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqat.errors import SqatError


def write_synced(path: Path, content: bytes) -> None:
    """Write one file and wait until it is on the disk."""
    with path.open("wb") as file:
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
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(fresh, content)
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise SqatError(f"cannot be written: {error.strerror or error}", "free space, or choose another place",
                        str(path), code="unwritable-file") from error  # fmt: skip


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Give an empty folder to write into; at the end, sync it and rename it to ``directory``.

    Raises:
        SqatError: the folder cannot be written; what was there stays.
    """
    fresh = directory.with_name(f".{directory.name}.new")
    previous = directory.with_name(f".{directory.name}.old")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        clean_up(directory, fresh, previous)
        fresh.mkdir()
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        if directory.exists():
            directory.rename(previous)
        fresh.rename(directory)
        sync(directory.parent)
    except OSError as error:
        raise SqatError(f"cannot be written: {error.strerror or error}", "free space or choose another folder",
                        str(directory), code="unwritable-file") from error  # fmt: skip
    finally:
        clean_up(directory, fresh, previous)


def clean_up(directory: Path, fresh: Path, previous: Path) -> None:
    """Restore the previous folder if a write ended between its two renames, and delete leftovers."""
    if previous.exists() and not directory.exists():
        previous.rename(directory)
    for leftover in (fresh, previous):
        shutil.rmtree(leftover, ignore_errors=True)


def check_json_name(path: Path | None) -> None:
    """Refuse to write figures over another kind of file: ``bench --json model.onnx`` would cost the model.

    Raises:
        SqatError: the file's name does not end in .json.
    """
    if path is not None and path.suffix != ".json":
        raise SqatError(f"figures are written as JSON, not to a {path.suffix or 'file without an ending'}",
                        "name a .json file", str(path), code="usage")  # fmt: skip
