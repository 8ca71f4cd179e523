"""The processes of a distributed run: who has which part of the work, and how they agree.

Work is shared in whole pieces (batches), numbered by their place in the whole and dealt in turn, so that what a piece
is does not depend on how many processes there are. What comes out is added up or taken from its owner, by all alike.
Left out: a process that is lost in the middle; it ends the others, and the run goes on from what was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, distributed

from sqat.errors import SqatError

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def processes() -> PartialState:
    """This process among those of a distributed run; on the CPU (gloo) where there is no accelerator."""
    asked_for_shards()
    return PartialState(cpu=not torch.accelerator.is_available())


@cache
def asked_for_shards() -> bool:
    """Whether the launcher asked for FSDP; Accelerate, which would share the model out in its own way, is not told."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def in_shards() -> bool:
    """Whether processes share the model out (`sqat.training.fsdp`) instead of holding it whole."""
    return asked_for_shards() and processes().num_processes > 1


def first_says(text: str) -> str:
    """What the first process says, so that all go the same way."""
    said = [text]
    broadcast_object_list(said)
    return said[0]


def by_first(work: Callable[[], object]) -> None:
    """Let the first process do what only one may do, while the others wait.

    Raises:
        SqatError: it cannot be done, as the first process finds; in all processes, so that none waits for it in vain.
    """
    failed = ""
    if processes().is_main_process:
        try:
            work()
        except SqatError as error:
            failed = json.dumps([error.problem, error.hint, error.place])
    if failed := first_says(failed):
        processes().wait_for_everyone()  # the first to end would cut off one that has not heard yet
        raise SqatError(*json.loads(failed))


def one_says(text: str) -> str:
    """What the first of those processes says that have anything to say; empty where none has."""
    said: list[str] = gather_object([text])
    return next(filter(None, said), "")


def any_process(*flags: bool) -> list[bool]:
    """Which flags are up in any process; all of them must ask, in the same order."""
    return [bool(flag) for flag in over_all(torch.tensor([*map(float, flags)]), distributed.ReduceOp.MAX)]


def summed(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor; all have the same bits."""
    return over_all(tensor, distributed.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """The largest of every process's tensor, value by value."""
    return over_all(tensor, distributed.ReduceOp.MAX)


def over_all(tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
    """One tensor made of every process's."""
    return exchanged(tensor, lambda shared: distributed.all_reduce(shared, operation))


def of_process(tensor: Tensor, owner: int) -> Tensor:
    """The tensor that process ``owner`` has; the others' must have its shape and type."""
    return exchanged(tensor, lambda shared: distributed.broadcast(shared, owner))


def exchanged(tensor: Tensor, exchange: Callable[[Tensor], object]) -> Tensor:
    """What an exchange in place makes of a copy on the device that processes talk through; where it was, as before."""
    state = processes()
    if state.num_processes == 1:
        return tensor
    shared = tensor.to(state.device, copy=True)
    exchange(shared)
    return shared.to(tensor.device)


def turns(count: int) -> Iterator[tuple[int, bool]]:
    """This process's share of ``count`` pieces by number, and whether a piece counts.

    Every process takes as many turns: one for which nothing is left in the last round does the first piece again, and
    what comes of it does not count.
    """
    state = processes()
    for first in range(0, count, state.num_processes):
        mine = first + state.process_index
        yield (mine, True) if mine < count else (0, False)


@contextmanager
def told_of_loss() -> Iterator[None]:
    """While open, the end of another process of the run is told in one line, wherever it is noticed.

    Raises:
        SqatError: the others cannot be reached any more.
    """
    try:
        yield
    except RuntimeError as error:
        if processes().num_processes == 1 or not is_loss(error):
            raise
        raise SqatError("another process of this run has ended, without which this one cannot go on",
                        "the same command goes on from the last saved state") from error  # fmt: skip


def is_loss(error: RuntimeError) -> bool:
    """Whether an error is that of the connection to the other processes."""
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in LOST)
