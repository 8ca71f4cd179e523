"""Groups of processes as a launcher starts them, forked from one that has imported everything: seconds less each."""

from __future__ import annotations

import os
import resource
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def start(world: int, work: Callable[[int], object], shards: bool = False) -> list[int]:
    """Fork a group whose processes each call ``work`` with their rank, and find each other by gloo; returns their ids.

    Args:
        shards: tell them what ``accelerate launch --use_fsdp`` does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [fork(rank, work, {**shared, "ACCELERATE_USE_FSDP": str(shards).lower()}) for rank in range(world)]


def fork(rank: int, work: Callable[[int], object], shared: dict[str, str]) -> int:
    """Start one process, whose exit code is 1 where its work raises; returns its id."""
    child = os.fork()
    if child:
        return child
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update({**shared, **own} if shared["WORLD_SIZE"] != "1" else {})
    try:
        work(rank)
    except BaseException:  # told here, for the process must not go on as its parent would
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ends(children: list[int]) -> list[int]:
    """Exit codes of a group, once all have ended; what an error leaves is killed."""
    try:
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    finally:
        for child in children:
            kill(child)


def kill(child: int) -> None:
    """Kill a process that is still there."""
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """While open, no file of this process grows beyond ``size`` bytes: as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
