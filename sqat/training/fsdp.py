"""Shard a model over the ranks with FSDP2, and gather it whole again.

A rank holds its shard of weights, gradients and moments during a step. Between steps `summon_full_params` gives
every rank the whole model, so that masks, evaluation and saved states need no code of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sqat.compat import hook_tables, own_parameters
from sqat.distributed import all_reduce_sum, process_state

Whole = dict[int, nn.Parameter]


def send_gradients_(objective: nn.Module, wanted: bool) -> None:
    """Whether the backward passes that follow add up the gradients of all processes, or only gather their own."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(wanted)


class Shards:
    """A model whose tensors are shared out, for as long as `sharded_` lasts.

    Args:
        objective: holds the model, and computes its loss.
        model: changed in place; its modules stay the same objects, with the hooks they have.
        blocks: names of modules of the model whose tensors travel together.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, blocks: Iterable[str]) -> None:
        self.modules = list(model.modules())
        self.kinds = [type(module) for module in self.modules]
        self.names = [set(vars(module)) for module in self.modules]
        self.hooks = [[(hooks, set(hooks)) for hooks in hook_tables(module)] for module in self.modules]
        self.scalars = [parameter for parameter in model.parameters() if not parameter.dim()]
        mesh = init_device_mesh(process_state().device.type, (process_state().num_processes,))
        for module in (*map(model.get_submodule, blocks), objective):
            fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params={*self.scalars})
        self.sharing: list[tuple[type[nn.Module], list[dict[int, object]], dict[str, Any]]] = []

    def make_plain_(self, gather: bool = True) -> Whole:
        """Put whole parameters in place of the shares; returns them by the id of a share.

        Args:
            gather: with the values of all processes, which must all call this; otherwise with nothing in them.
        """
        whole_ones: Whole = {}
        self.sharing = [
            (type(module), [dict(hooks) for hooks, _ in known], dict(own_parameters(module)))
            for module, known in zip(self.modules, self.hooks, strict=True)
        ]
        for module, kind, known, (_, _, shares) in zip(self.modules, self.kinds, self.hooks, self.sharing, strict=True):
            module.__class__ = kind
            for hooks, before in known:
                for key in set(hooks) - before:
                    del hooks[key]
            for name, share in shares.items():
                if isinstance(share, DTensor):
                    if id(share) not in whole_ones:
                        value = full_tensor(share.detach()).clone() if gather else torch.empty(share.shape)
                        whole_ones[id(share)] = nn.Parameter(value, requires_grad=share.requires_grad)
                    own_parameters(module)[name] = whole_ones[id(share)]
        return whole_ones

    @torch.no_grad()
    def make_shared_(self, whole_ones: Whole) -> None:
        """Undo `make_plain_`, with the values that the whole parameters have now."""
        for module, known, (kind, added, shares) in zip(self.modules, self.hooks, self.sharing, strict=True):
            module.__class__ = kind
            for (hooks, _), ours in zip(known, added, strict=True):
                hooks.clear()
                hooks.update(ours)
            for name, share in shares.items():
                if isinstance(share, DTensor) and id(share) in whole_ones:
                    share.copy_(shard_like(share, whole_ones.pop(id(share)).detach()))
                own_parameters(module)[name] = share
        self.sharing = []

    def forget_(self) -> None:
        """Take away what torch has noted on the modules."""
        for module, names in zip(self.modules, self.names, strict=True):
            for name in set(vars(module)) - names:
                delattr(module, name)

    def average_scalars_(self) -> None:
        """Average the gradients of what is not shared out over the processes."""
        known = [scalar.grad for scalar in self.scalars if scalar.grad is not None]
        if known:
            mean = all_reduce_sum(torch.stack(known)) / process_state().num_processes
            for gradient, value in zip(known, mean, strict=True):
                gradient.copy_(value)


SHARDED: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


@contextmanager
def sharded_(objective: nn.Module, model: nn.Module, blocks: Iterable[str]) -> Iterator[Shards]:
    """Share a model's tensors out; afterwards every process has it whole again, or empty where an error ended it."""
    shards = SHARDED[model] = Shards(objective, model, blocks)
    done = False
    try:
        yield shards
        done = True
    finally:
        del SHARDED[model]
        shards.make_plain_(gather=done)  # of processes that fail, each fails alone
        shards.forget_()


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """While open, the model is whole in every process, all of which must open it; what changes in it stays."""
    shards = SHARDED.get(model)
    if shards is None or shards.sharing:  # never shared out, or open already
        yield
        return
    whole_ones = shards.make_plain_()
    yield
    shards.make_shared_(whole_ones)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, whole; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(share: Tensor, tensor: Tensor) -> Tensor:
    """This process's share of a whole tensor, where the other one is shared out."""
    if not isinstance(share, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor.to(share.device), share.device_mesh, share.placements, src_data_rank=None)
