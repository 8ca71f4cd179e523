"""Catches q, k and v of one block while a model runs, for MiniLM distillation.

What is caught is the output of the q, k, v linears: before the attention products' fake quantizers, and
before a rotary position embedding where a family has one (the relations then compare content, not position).
Where several heads share a key and a value (grouped-query attention), these are repeated for each of them, as the
products read them: the relations of a shared head then count once in the mean over all heads, not more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.modules.parametrize import linear


class Capture:
    """Holds the q, k and v of the last forward pass; `remove` gives the model back.

    Args:
        names: three linears in the order q, k, v, or one fused whose output is [q, k, v].
        heads: attention heads of the model.
        key_heads: heads that keys and values have; as many as queries where it is not given.
        causal: whether a position reads those before it alone.

    Raises:
        SqatError: a fused linear whose outputs these heads do not divide.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], heads: int, key_heads: int | None = None, causal: bool = False
    ) -> None:
        self.names, self.heads, self.causal = tuple(names), heads, causal
        self.groups = heads // (key_heads or heads)
        self.widths = [linear(model, name).out_features for name in names]
        if len(names) == 1:
            self.widths = fused_widths(names[0], self.widths[0], heads, heads // self.groups)
        self.outputs: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(partial(self.keep, name)) for name in names
        ]

    def keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.outputs[name] = output

    def take(self) -> QKV:
        """The caught tensors, [B,T,H] each; they are forgotten here."""
        caught = [self.outputs.pop(name) for name in self.names]
        return self.of(*(caught if len(caught) == 3 else caught[0].split(self.widths, dim=-1)))

    def blank(self, tokens: int) -> QKV:
        """Zeros of the shapes `take` returns for one sample of ``tokens`` positions."""
        return self.of(*(torch.zeros(1, tokens, width) for width in self.widths))

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> QKV:
        """Query, key and value as the products read them."""
        key, value = (repeat_heads(x, self.heads, self.groups) for x in (key, value))
        return QKV(query, key, value, self.heads, self.causal)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def fused_widths(name: str, width: int, heads: int, key_heads: int) -> list[int]:
    """Outputs of a fused linear that are q, k and v."""
    count = heads + 2 * key_heads
    if width % count:
        raise SqatError(f"{name} has {width} outputs, which are not q, k and v of {heads} and {key_heads} heads",
                        "set distill.qkv to three linears, or distill.minilm_weight: 0")  # fmt: skip
    return [width // count * part for part in (heads, key_heads, key_heads)]


def repeat_heads(x: Tensor, heads: int, groups: int) -> Tensor:
    """[B,T,H/groups] -> [B,T,H]: each head ``groups`` times, one behind the other."""
    return x if groups == 1 else x.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, dim=2).flatten(2)
