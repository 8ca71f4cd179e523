"""Ranks of a distributed run: who takes which batches, and collective operations on tensors and texts.

Work is dealt out in whole batches by number, so that a batch does not depend on the number of ranks. Every rank ends
with the same result.
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

LOST_PEER_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def process_state() -> PartialState:
    """Return Accelerate's state of this process; it uses gloo on the CPU where there is no accelerator."""
    launched_with_fsdp()
    return PartialState(cpu=not torch.accelerator.is_available())


@cache
def launched_with_fsdp() -> bool:
    """Say whether the launcher asked for FSDP, and hide that from Accelerate, which would shard in its own way."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def uses_fsdp() -> bool:
    """Say whether the ranks shard the model (`sqat.training.fsdp`) instead of replicating it."""
    return launched_with_fsdp() and process_state().num_processes > 1


def broadcast_from_rank0(text: str) -> str:
    """Return the text of rank 0 on every rank."""
    texts = [text]
    broadcast_object_list(texts)
    return texts[0]


def run_on_rank0(work: Callable[[], object]) -> None:
    """Run ``work`` on rank 0 while the other ranks wait.

    Raises:
        SqatError: rank 0 raised it; every rank raises the same.
    """
    failure = ""
    if process_state().is_main_process:
        try:
            work()
        except SqatError as error:
            failure = json.dumps([error.problem, error.hint, error.place, error.code])
    if failure := broadcast_from_rank0(failure):
        process_state().wait_for_everyone()  # the first rank to exit would cut off one that has not received this
        problem, hint, place, code = json.loads(failure)
        raise SqatError(problem, hint, place, code=code)


def first_nonempty(text: str) -> str:
    """Return the first text that is not empty, in the order of the ranks; empty where all are."""
    texts: list[str] = gather_object([text])
    return next(filter(None, texts), "")


def any_rank(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any rank; every rank must call this."""
    return [bool(flag) for flag in all_reduce_max(torch.tensor([*map(float, flags)]))]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of every rank's tensor, with the same bits on every rank."""
    return communicate(tensor, lambda shared: distributed.all_reduce(shared, distributed.ReduceOp.SUM))


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum of every rank's tensor."""
    return communicate(tensor, lambda shared: distributed.all_reduce(shared, distributed.ReduceOp.MAX))


def broadcast_from(tensor: Tensor, rank: int) -> Tensor:
    """Return the tensor of one rank; the other ranks pass one of the same shape and type."""
    return communicate(tensor, lambda shared: distributed.broadcast(shared, rank))


def communicate(tensor: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
    """Apply an in-place collective to a copy on the communication device, and return it on the tensor's device."""
    state = process_state()
    if state.num_processes == 1:
        return tensor
    shared = tensor.to(state.device, copy=True)
    operation(shared)
    return shared.to(tensor.device)


def assigned_indices(count: int) -> Iterator[tuple[int, bool]]:
    """Yield this rank's share of the indices below ``count``, each with whether it counts.

    Every rank gets the same number of indices, so that collectives match: where the last round has none left for a
    rank, it repeats index 0 and the result does not count.
    """
    state = process_state()
    for first in range(0, count, state.num_processes):
        index = first + state.process_index
        yield (index, True) if index < count else (0, False)


def leave_processes() -> None:
    """End the connection to the other ranks; torch may abort a process that exits with it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def raise_on_lost_peer() -> Iterator[None]:
    """Turn a broken connection to another rank into one clear error.

    Raises:
        SqatError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if process_state().num_processes == 1 or not is_lost_peer(error):
            raise
        raise SqatError("another process of this run has ended, and this one cannot go on without it",
                        "run the same command again: it resumes from the last saved state",
                        code="lost-process") from error  # fmt: skip


def is_lost_peer(error: RuntimeError) -> bool:
    """Say whether an error comes from the connection to the other ranks."""
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in LOST_PEER_SIGNS)
