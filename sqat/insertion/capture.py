"""Catches q, k and v of one block while a model runs, for MiniLM distillation.

What is caught is the output of the q, k, v linears: before the attention products' fake quantizers, and
before a rotary position embedding where a family has one (the relations then compare content, not position).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.distillation.minilm import QKV
from sqat.insertion.weights import linear


class Capture:
    """Holds the q, k and v of the last forward pass; `remove` gives the model back.

    Args:
        names: three linears in the order q, k, v, or one fused whose output is [q, k, v].
        heads: attention heads of the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], heads: int) -> None:
        self.names, self.heads = tuple(names), heads
        self.widths = [linear(model, name).out_features for name in names]
        self.outputs: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(partial(self.keep, name)) for name in names
        ]

    def keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.outputs[name] = output

    def take(self) -> QKV:
        """The caught tensors, [B,T,H] each; they are forgotten here."""
        caught = [self.outputs.pop(name) for name in self.names]
        query, key, value = caught if len(caught) == 3 else caught[0].chunk(3, dim=-1)
        return QKV(query, key, value, self.heads)

    def blank(self, tokens: int) -> QKV:
        """Zeros of the shapes `take` returns for one sample of ``tokens`` positions."""
        widths = self.widths if len(self.widths) == 3 else [self.widths[0] // 3] * 3
        query, key, value = (torch.zeros(1, tokens, width) for width in widths)
        return QKV(query, key, value, self.heads)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
