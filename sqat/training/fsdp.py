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

WholeParameters = dict[int, nn.Parameter]  # by the id of the shard


def set_gradient_sync_(objective: nn.Module, enabled: bool) -> None:
    """Set whether backward passes reduce gradients over the ranks, or only accumulate their own."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(enabled)


class Shards:
    """A model whose tensors are sharded, for as long as `shard_model` is open.

    FSDP2 cannot hold whole tensors, change them and write them back (PyTorch issue 137129), and its hooks take every
    gradient. So this takes FSDP's class, hooks and shards off the modules by hand, and puts them back.

    Args:
        objective: holds the model, and computes its loss.
        model: changed in place; its modules stay the same objects, with the hooks they have.
        blocks: names of modules whose tensors are gathered together.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, blocks: Iterable[str]) -> None:
        self.modules = list(model.modules())
        self.types = [type(module) for module in self.modules]
        self.attributes = [set(vars(module)) for module in self.modules]
        self.hooks = [[(hooks, set(hooks)) for hooks in hook_tables(module)] for module in self.modules]
        # FSDP cannot shard single numbers (learned scales): every rank keeps them and averages their gradients.
        self.scalars = [parameter for parameter in model.parameters() if not parameter.dim()]
        mesh = init_device_mesh(process_state().device.type, (process_state().num_processes,))
        for module in (*map(model.get_submodule, blocks), objective):
            # Weights stay gathered between forward and backward: distillation reads them from inside a block.
            fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params={*self.scalars})
        self.fsdp_state: list[tuple[type[nn.Module], list[dict[int, object]], dict[str, Any]]] = []

    @property
    def is_whole(self) -> bool:
        """Whether the model holds whole parameters now."""
        return bool(self.fsdp_state)

    def unshard_(self, gather: bool = True) -> WholeParameters:
        """Put whole parameters in place of the shards.

        Args:
            gather: with the values of all ranks, which must all call this; otherwise uninitialized.
        """
        whole: WholeParameters = {}
        self.fsdp_state = [
            (type(module), [dict(hooks) for hooks, _ in tables], dict(own_parameters(module)))
            for module, tables in zip(self.modules, self.hooks, strict=True)
        ]
        for module, kind, tables, state in zip(self.modules, self.types, self.hooks, self.fsdp_state, strict=True):
            module.__class__ = kind
            for hooks, before in tables:
                for key in set(hooks) - before:
                    del hooks[key]
            for name, shard in state[2].items():
                if isinstance(shard, DTensor):
                    if id(shard) not in whole:
                        value = full_tensor(shard.detach()).clone() if gather else torch.empty(shard.shape)
                        whole[id(shard)] = nn.Parameter(value, requires_grad=shard.requires_grad)
                    own_parameters(module)[name] = whole[id(shard)]
        return whole

    @torch.no_grad()
    def reshard_(self, whole: WholeParameters) -> None:
        """Undo `unshard_`, with the values that the whole parameters have now."""
        for module, tables, (kind, all_hooks, shards) in zip(self.modules, self.hooks, self.fsdp_state, strict=True):
            module.__class__ = kind
            for (hooks, _), entries in zip(tables, all_hooks, strict=True):
                hooks.clear()
                hooks.update(entries)
            for name, shard in shards.items():
                if isinstance(shard, DTensor) and id(shard) in whole:
                    shard.copy_(shard_like(shard, whole.pop(id(shard)).detach()))
                own_parameters(module)[name] = shard
        self.fsdp_state = []

    def remove_attributes_(self) -> None:
        """Remove the attributes that FSDP added to the modules."""
        for module, names in zip(self.modules, self.attributes, strict=True):
            for name in set(vars(module)) - names:
                delattr(module, name)

    def average_scalars_(self) -> None:
        """Average over the ranks the gradients of what is not sharded."""
        gradients = [scalar.grad for scalar in self.scalars if scalar.grad is not None]
        if gradients:
            mean = all_reduce_sum(torch.stack(gradients)) / process_state().num_processes
            for gradient, value in zip(gradients, mean, strict=True):
                gradient.copy_(value)


SHARDED: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


@contextmanager
def shard_model(objective: nn.Module, model: nn.Module, blocks: Iterable[str]) -> Iterator[Shards]:
    """Shard a model while open; afterwards every rank has it whole, or uninitialized where an error ended it."""
    shards = SHARDED[model] = Shards(objective, model, blocks)
    done = False
    try:
        yield shards
        done = True
    finally:
        del SHARDED[model]
        shards.unshard_(gather=done)  # each rank that fails, fails alone
        shards.remove_attributes_()


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Hold the whole model on every rank while open; all ranks must open it, and changes stay."""
    shards = SHARDED.get(model)
    if shards is None or shards.is_whole:
        yield
        return
    whole = shards.unshard_()
    yield
    shards.reshard_(whole)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded, whole; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(shard: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor, where the other tensor is sharded."""
    if not isinstance(shard, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)
