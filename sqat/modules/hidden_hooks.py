"""Hooks on the outputs of a model's blocks, for the distillation of hidden states.

Shapes: B samples, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.errors import SqatError

INSTEAD = "leave hidden_weight at 0"


class HiddenHooks:
    """Keeps what each block returned in the last forward pass; `remove` gives the model back.

    Args:
        blocks: names of the blocks; one that runs several times (ALBERT) counts each time.
        multiple: the model fills up texts on the right, to a multiple of so many tokens.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], multiple: int = 1) -> None:
        self.model_name, self.multiple = type(model).__name__, multiple
        self.outputs: list[object] | None = None  # of the last forward pass; None before it, and after `pop`
        self.handles: list[RemovableHandle] = [model.register_forward_pre_hook(self.forget)]
        self.handles += [model.get_submodule(name).register_forward_hook(self.on_output) for name in blocks]

    def forget(self, *_: object) -> None:
        """Drop what an earlier forward pass left (a forward pre-hook of the model)."""
        self.outputs = []

    def on_output(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Keep a copy of a block's hidden states: what follows may write into them (a forward hook)."""
        hidden = output[0] if isinstance(output, tuple | list) and output else output
        if self.outputs is not None:  # a backward pass may run a block again, to spare memory
            self.outputs.append(hidden.clone() if isinstance(hidden, Tensor) else hidden)

    def pop(self, samples: int, tokens: int | None = None) -> list[Tensor]:
        """Return the hidden states of the last forward pass, [B, T, H] for texts, and forget them.

        Args:
            tokens: T of a text; None for an image, which the model itself cuts into patches and windows.

        Raises:
            SqatError: a block does not return hidden states of these tokens, or returns them without a gradient.
        """
        outputs, found = self.outputs, list[Tensor]()
        self.outputs = None
        if not outputs:
            raise SqatError(f"{self.model_name}: its blocks are never called", INSTEAD, code="unsupported-model")
        filled = None if tokens is None else tokens + -tokens % self.multiple
        for number, hidden in enumerate(outputs):
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            if not isinstance(hidden, Tensor) or (filled is not None and got[:2] != [samples, filled]):
                raise SqatError(f"{self.model_name}: hidden states of [{samples}, {tokens or 'patches'}, width] are "
                                f"needed from block {number}, which returned {got}", INSTEAD,
                                code="unsupported-model")  # fmt: skip
            found.append(hidden if tokens is None else hidden[:, :tokens])
        return found

    def check_gradient(self, hidden: Sequence[Tensor]) -> None:
        """Refuse hidden states through which nothing learns, as those of Reformer."""
        if torch.is_grad_enabled() and not hidden[-1].requires_grad:
            raise SqatError(f"{self.model_name} computes its hidden states without a gradient", INSTEAD,
                            code="unsupported-model")  # fmt: skip

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
