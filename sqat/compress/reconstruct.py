"""Blockwise reconstruction: each block learns to give the dense block's output from what the sparse model feeds it.

arXiv:2510.14444, 2402.12419. Masks and scales stay fixed, rows need no labels. Block after block learns, its kept
weights, biases and norms alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sqat.compress.partial_runs import PartialRuns, check_blocks
from sqat.data.batch import Batch
from sqat.errors import SqatError
from sqat.models.layer_selection import encoder_blocks
from sqat.modules.activation_quantizers import QUANTIZERS, Quantizers
from sqat.modules.outputs import floats_in
from sqat.modules.parametrize import is_ours

BEFORE, AFTER = "error before", "error after"


class Reconstruction:
    """The blocks of a model that learn, one after another, and the loss of the block whose turn it is.

    Args:
        model: with its masks, and quantizers if it has some, in place; dropout is off (`without_dropout`).
        teacher: the dense model, in eval mode.
        examples: batches on which each block is measured before and after it has learned.
        steps_per_block: training steps of each block.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, examples: Sequence[Batch], steps_per_block: int) -> None:
        self.model, self.examples, self.steps_per_block = model, examples, steps_per_block
        self.blocks = encoder_blocks(model)
        self.numbers = [number for number, name in enumerate(self.blocks) if is_changed(model.get_submodule(name))]
        if not self.numbers:
            raise SqatError("no block has a layer that is pruned or quantized, so none can be reconstructed",
                            "leave reconstruct out", code="no-layer")  # fmt: skip
        check_teacher(model, teacher, self.blocks)
        model.eval()
        check_blocks(model, self.blocks, examples[0])
        self.sparse, self.dense = PartialRuns(model, self.blocks), PartialRuns(teacher, self.blocks)
        for runs in (self.sparse, self.dense):
            runs.check_continuing(examples[0])
        self.start = {number: copy_parameters(self.sparse.modules[number]) for number in self.numbers}
        self.number = self.numbers[0]

    @property
    def steps(self) -> int:
        """Training steps of all blocks."""
        return len(self.numbers) * self.steps_per_block

    @property
    def block(self) -> str:
        """Name of the block that learns."""
        return self.blocks[self.number]

    def before_step(self, step: int) -> None:
        """Choose the block that learns in a training step."""
        self.number = self.numbers[step // self.steps_per_block]
        self.model.eval()
        quantizers = dict(self.model.named_children()).get(QUANTIZERS)
        if isinstance(quantizers, Quantizers) and quantizers.kernels:
            self.sparse.modules[self.number].train()  # in eval mode it computes as the kernels do, without gradients

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the error of the block that learns; only its weights get gradients."""
        return {"reconstruction": self.error(batch, with_grad=True)}

    def error(self, batch: Batch, *, with_grad: bool = False) -> Tensor:
        """Return the relative error of the current block's output, a scalar."""
        target = self.dense.run(self.number, batch, self.number)
        output = self.sparse.run(self.number, batch, self.number - 1, with_grad=with_grad)
        return relative_error(output, target, batch.inputs.get("attention_mask"))

    def measure(self) -> dict[str, float]:
        """Return the mean error of the current block on the examples, with the weights it began with and with its own.

        What it began with is known again after a resume, and so both see the same inputs.
        """
        self.model.eval()
        block, start = self.sparse.modules[self.number], self.start[self.number]
        own = copy_parameters(block)
        figures = {}
        for name, weights in ((BEFORE, start), (AFTER, own)):
            load_parameters_(block, weights)
            figures[name] = float(torch.stack([self.error(batch).detach() for batch in self.examples]).mean())
        return figures


def relative_error(output: Any, target: Any, attention_mask: Tensor | None) -> Tensor:
    """Return the mean of |x - y|^2 / |y|^2 over the real tokens of two outputs of a block.

    Each token counts alike: in some families the first one is thousands of times as large as the others.

    Args:
        output: a tensor [B,T,H], or a tuple of such tensors and others.
        target: the same of the dense block.
        attention_mask: [B,T], 1 = real; None where nothing is padded.
    """
    pairs = [*zip(floats_in(output), floats_in(target), strict=True)]
    pairs = [(x, y) for x, y in pairs if x.dim() == pairs[0][0].dim()]  # without position biases and the like
    errors = []
    for x, y in pairs:
        left, right = (real_tokens(each, attention_mask).float() for each in (x, y))
        errors.append(((left - right).square().sum(-1) / right.square().sum(-1).clamp(min=1e-12)).mean())
    return torch.stack(errors).mean()


def real_tokens(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the vectors [N,H] of the tokens that are not padding; all where the mask is of another shape."""
    if attention_mask is None or attention_mask.shape != x.shape[:-1]:
        return x.flatten(0, -2)
    return x[attention_mask.bool()]


def is_changed(block: nn.Module) -> bool:
    """Say whether a block has a layer with a mask or a fake quantizer."""
    return any(is_ours(module) for module in block.modules())


def check_teacher(model: nn.Module, teacher: nn.Module, blocks: Sequence[str]) -> None:
    """Raise unless the teacher has the model's blocks, with parameters of the same number."""
    modules = dict(teacher.named_modules())
    for name in blocks:
        sizes = [sum(p.numel() for p in each.parameters()) for each in (model.get_submodule(name), modules.get(name))
                 if each is not None]  # fmt: skip
        if len(sizes) < 2 or sizes[0] != sizes[1]:
            raise SqatError(f"the teacher has no block {name} of the same shape", "teach with the dense model itself",
                            code="model-mismatch")  # fmt: skip


def copy_parameters(block: nn.Module) -> dict[str, Tensor]:
    """Copy the trained tensors of a block."""
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


@torch.no_grad()
def load_parameters_(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the trained tensors of a block."""
    for name, parameter in block.named_parameters():
        parameter.copy_(values[name])


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set the rate of each dropout to 0 while open, for blocks that learn in train mode."""
    rates = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        for module in rates:
            module.p = 0.0
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate
