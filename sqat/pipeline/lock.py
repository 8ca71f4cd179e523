"""One run at a time in a folder: an flock on a file in it, which also tells a second run who holds it.

The kernel frees the lock when its holder ends, however it ends; what the file says is for people only. A file that
is there without a lock was left by a run that was killed. Of a distributed run the first process holds the lock.
Left out: systems without flock (Windows), where runs are not kept apart, and file systems that do not share it
between hosts.
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
from sqat.progress import Reporter

if sys.platform != "win32":
    import fcntl

FILE = ".lock"
LONGEST_COMMAND = 200


@contextmanager
def run_lock(directory: Path, reporter: Reporter, file: str = FILE) -> Iterator[None]:
    """Hold a folder's lock while the block runs; every process of a distributed run learns what the first finds.

    Raises:
        SqatError: another run holds it, or the folder cannot be written.
    """
    held: list[int] = []

    def take() -> None:
        if sys.platform != "win32":
            handle, told = take_lock(directory / file)
            held.append(handle)
            if told:
                reporter.info(told)

    try:
        run_on_rank0(take)
        yield
    finally:
        for handle in held:
            release_lock(handle, directory / file)


def take_lock(path: Path) -> tuple[int, str]:
    """A locked handle of the file, and what there is to say of a holder that was killed.

    Raises:
        SqatError: another run holds it, or the folder cannot be written.
    """
    assert sys.platform != "win32"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = read_holder(handle) or "it began this very moment"
                os.close(handle)
                raise SqatError(f"another run holds this folder: {held}", "wait for it or stop it",
                                str(path.parent)) from None  # fmt: skip
            if is_same_file(handle, path):
                break
            os.close(handle)  # its holder has just ended and taken the file away
        before = read_holder(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(describe_holder()).encode(), 0)
    except OSError as error:
        raise SqatError(f"cannot be written: {error.strerror}", "free space or choose another output",
                        str(path.parent)) from error  # fmt: skip
    return handle, f"taken over from a run that ended without a word: {before}" if before else ""


def release_lock(handle: int, path: Path) -> None:
    """Take the file away, if it is still the one that is locked, and let go of it.

    A file that cannot be taken away stays, for the next run to follow; how the work itself ended is not hidden.
    """
    with suppress(OSError):
        if is_same_file(handle, path):
            path.unlink()
    os.close(handle)


def is_same_file(handle: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def describe_holder() -> dict[str, str | int]:
    """This process, for whoever comes second."""
    command = shlex.join(sys.argv)[:LONGEST_COMMAND]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def read_holder(handle: int) -> str:
    """The holder in words; empty where the file is, for a holder may not have written it yet."""
    content = os.pread(handle, 4096, 0)
    try:
        known = json.loads(content)
        return f"pid {known['pid']} on {known['host']} since {known['since']} ({known['command']})"
    except (ValueError, KeyError, TypeError):
        return "a run that has not said who it is" if content else ""
