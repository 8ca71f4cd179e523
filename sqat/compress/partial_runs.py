"""Run a model up to the end of one of its blocks, and go on from there later.

The model's own forward runs, so that masks, positions and what else it hands to its blocks are its own. Blocks that
are done return the remembered output at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.modules.hooks import Hooks
from sqat.modules.outputs import floats_in
from sqat.training.batches import seed_torch

MAX_BYTES = 1 << 29  # of a model's remembered outputs; beyond it, passes start from the inputs


class BlockDoneError(Exception):
    """Ends a forward pass after a block; holds the block's output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class PartialRuns:
    """Forward passes of one model, each up to the end of a block.

    Args:
        blocks: names of its blocks, in the order in which they run.
    """

    def __init__(self, model: nn.Module, blocks: list[str]) -> None:
        self.model, self.modules = model, [model.get_submodule(name) for name in blocks]
        self.max_bytes = MAX_BYTES
        self.outputs: dict[int, tuple[int, Any]] = {}  # key of a batch -> number of a block, its output

    def run(self, number: int, batch: Batch, remember: int, *, with_grad: bool = False) -> Any:
        """Return the output of a block for a batch.

        Args:
            batch: `key_of` gives the key under which its outputs are remembered.
            remember: number of the block whose output later passes start from; at most ``number``.
            with_grad: record the gradient of this block's weights.
        """
        key = key_of(batch)
        done, output = self.outputs.get(key, (-1, None))
        if done == number:
            return output
        hooks = Hooks()
        for module in self.modules[: done + 1]:
            hooks.set_attribute(module, "forward", lambda *_, **__: copy_tensors(output))
        for each in {remember, number} - {*range(-1, done + 1)}:
            hook = partial(self.on_output, key, each, remember, number)
            hooks.handles.append(self.modules[each].register_forward_hook(hook))
        if with_grad:
            hooks.handles.append(self.modules[number].register_forward_pre_hook(enable_grad))
        seed_torch(key)  # some families draw numbers in eval mode too
        try:
            with torch.no_grad():
                self.model(**batch.inputs)
        except BlockDoneError as end:
            return end.output
        finally:
            hooks.remove()
        raise AssertionError("each block runs in each pass")  # as `check_blocks` has found

    def on_output(self, key: int, number: int, remember: int, last: int, *call: Any) -> None:
        """Remember the output of a block, and end the pass after the last one."""
        output = call[-1]
        if number == remember:
            others = sum(size_of(stored) for other, (_, stored) in self.outputs.items() if other != key)
            self.outputs.pop(key, None)
            if others + size_of(output) <= self.max_bytes:
                self.outputs[key] = (number, copy_tensors(output))
        if number == last:
            raise BlockDoneError(output)

    def check_continuing(self, batch: Batch) -> None:
        """Start each pass from the inputs where a model goes on otherwise than from a whole pass (skip connections)."""
        last = len(self.modules) - 1
        for number in range(last):
            self.run(number, batch, number)
        continued = [*floats_in(self.run(last, batch, -1))]
        self.outputs.clear()
        whole = [*floats_in(self.run(last, batch, -1))]
        if not all(torch.equal(x, y) for x, y in zip(continued, whole, strict=True)):
            self.max_bytes = -1


def check_blocks(model: nn.Module, blocks: list[str], batch: Batch) -> None:
    """Raise unless a pass runs each block once and in order, and each has weights of its own."""
    calls: list[str] = []
    hooks = Hooks()
    for name in blocks:
        handle = model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        hooks.handles.append(handle)
    try:
        with torch.no_grad():
            model(**batch.inputs)
    finally:
        hooks.remove()
    owners: dict[int, str] = {}
    shared = [name for name in blocks for weight in model.get_submodule(name).parameters()
              if owners.setdefault(id(weight), name) != name]  # fmt: skip
    if calls != blocks or shared:
        what = f"block {shared[0]} shares weights with another" if shared else "blocks do not run once each, in order"
        raise SqatError(f"{type(model).__name__} cannot be reconstructed block by block: {what}",
                        "leave reconstruct out", code="unsupported-model")  # fmt: skip


def enable_grad(module: nn.Module, args: Any) -> None:
    """Record gradients from here on (a forward pre-hook); the pass ends with the block."""
    torch.set_grad_enabled(True)


def key_of(batch: Batch) -> int:
    """Return the key of a batch: the number of its first row, which is in no other batch."""
    return int(batch.labels[0])


def copy_tensors(output: Any) -> Any:
    """Copy the tensors of a block's output, which the model may write into."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    return type(output)(map(copy_tensors, output)) if type(output) in (tuple, list) else output


def size_of(output: Any) -> int:
    """Return the bytes of a block's output."""
    return sum(x.numel() * x.element_size() for x in floats_in(output))
