"""Hooks on q, k and v of one block, for MiniLM distillation.

They see the outputs of the q, k, v linears: before the fake quantizers of the attention products, and before a rotary
position embedding where a family has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.modules.parametrize import get_linear


class QkvHooks:
    """Keeps the q, k and v of the last forward pass; `remove` gives the model back.

    Args:
        names: three linears in the order q, k, v, or one fused whose output is [q, k, v].
        heads: attention heads of the model.
        key_heads: heads of keys and values; default: as many as queries have.
        causal: whether a position reads only those before it.

    Raises:
        SqatError: these heads do not divide the outputs of a fused linear.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], heads: int, key_heads: int | None = None, causal: bool = False
    ) -> None:
        self.names, self.heads, self.causal = tuple(names), heads, causal
        self.groups = heads // (key_heads or heads)
        self.widths = [get_linear(model, name).out_features for name in names]
        if len(names) == 1:
            self.widths = split_fused_width(names[0], self.widths[0], heads, heads // self.groups)
        self.outputs: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(partial(self.on_output, name)) for name in names
        ]

    def on_output(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep an output (a forward hook)."""
        self.outputs[name] = output

    def pop(self) -> QKV:
        """Return the tensors of the last forward pass, [B,T,H] each, and forget them."""
        outputs = [self.outputs.pop(name) for name in self.names]
        return self.to_qkv(*(outputs if len(outputs) == 3 else outputs[0].split(self.widths, dim=-1)))

    def zeros(self, tokens: int) -> QKV:
        """Return zeros of the shapes that `pop` returns for one sample of ``tokens`` positions."""
        return self.to_qkv(*(torch.zeros(1, tokens, width) for width in self.widths))

    def to_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> QKV:
        """Return query, key and value as the products read them; shared keys and values are repeated for each head."""
        key, value = (repeat_heads(x, self.heads, self.groups) for x in (key, value))
        return QKV(query, key, value, self.heads, self.causal)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def split_fused_width(name: str, width: int, heads: int, key_heads: int) -> list[int]:
    """Return how many outputs of a fused linear are q, k and v."""
    count = heads + 2 * key_heads
    if width % count:
        raise SqatError(f"{name} has {width} outputs, which are not q, k and v of {heads} and {key_heads} heads",
                        "set distill.qkv to three linears, or distill.minilm_weight: 0",
                        code="unsupported-model")  # fmt: skip
    return [width // count * part for part in (heads, key_heads, key_heads)]


def repeat_heads(x: Tensor, heads: int, groups: int) -> Tensor:
    """Return [B,T,H/groups] as [B,T,H]: each head ``groups`` times, one behind the other."""
    return x if groups == 1 else x.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, dim=2).flatten(2)
