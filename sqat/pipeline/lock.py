"""One run at a time in a folder: an flock on a file in it, which names its holder to a second run.

The kernel frees the lock when its holder ends, however it ends. Rank 0 of a distributed run holds the lock. Windows
has no flock, so two runs may share a folder there.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqat.distributed import run_on_rank0
from sqat.errors import SqatError
from sqat.files.replace import cannot_write, not_ours, open_own
from sqat.progress import Reporter

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"
MARK = b'{"pid": '  # how a lock file of ours begins
MAX_COMMAND = 200  # characters of the holder's command line


@contextmanager
def run_lock(directory: Path, reporter: Reporter, file: str = LOCK_FILE) -> Iterator[None]:
    """Hold a folder's lock inside the block; all ranks raise what rank 0 raises. A new folder that stays empty goes.

    Raises:
        SqatError: another run holds it, or the folder cannot be written.
    """
    path, handles = directory / file, list[int]()
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]

    def acquire() -> None:
        if sys.platform != "win32":
            handle, killed = acquire_lock(path)
            handles.append(handle)
            if killed:
                reporter.info(f"took over the lock of a run that was killed: {killed}")

    try:
        run_on_rank0(acquire)
        yield
    finally:
        for handle in handles:
            release_lock(handle, path)
            with suppress(OSError):  # a folder that is not empty stays
                for folder in missing:
                    folder.rmdir()


def acquire_lock(path: Path) -> tuple[int, str]:
    """Lock a file; return its handle and a description of a killed holder, empty without one.

    Raises:
        SqatError: another run holds it, or the folder cannot be written.
    """
    assert sys.platform != "win32"
    folder = str(path.parent)
    try:
        while True:
            handle = open_own(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = read_holder(handle) or "it has just started"
                os.close(handle)
                problem = f"another run holds this folder: {holder}"
                raise SqatError(problem, "wait for it or stop it", folder, code="locked") from None
            if is_same_file(handle, path):
                break
            os.close(handle)  # its holder has just ended and removed the file
        killed = read_holder(handle)
        if killed is None:
            os.close(handle)
            raise not_ours(path, "is not a lock file of sqat")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(describe_process()).encode(), 0)
    except OSError as error:
        raise cannot_write(error, path.parent) from error
    return handle, killed


def release_lock(handle: int, path: Path) -> None:
    """Remove the file, if it is still the locked one, and unlock it.

    A file that cannot be removed stays for the next run, and hides no error of the work itself.
    """
    with suppress(OSError):
        if is_same_file(handle, path):
            path.unlink()
    os.close(handle)


def is_same_file(handle: int, path: Path) -> bool:
    """Tell whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def describe_process() -> dict[str, str | int]:
    """Describe this process for a second run."""
    command = shlex.join(sys.argv)[:MAX_COMMAND]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def read_holder(handle: int) -> str | None:
    """Describe the holder that the file names; empty for an empty file, None for one that is no lock file."""
    content = os.pread(handle, 4096, 0).strip(b"\0")  # a power cut may leave zeros
    if not content:
        return ""
    if not content.startswith(MARK):
        return None
    try:
        holder = json.loads(content)
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    except (ValueError, KeyError, TypeError):
        return "an unknown run"
