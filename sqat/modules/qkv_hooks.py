"""Hooks on q, k and v of one block, for MiniLM distillation.

They see the outputs of the q, k, v linears: before the fake quantizers of the attention products, and before a rotary
position embedding where a family has one.

Shapes: B samples, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.modules.parametrize import get_linear

INSTEAD = "name other linears as qkv (in a recipe, distill.qkv), or distil outputs only (distill: {minilm_weight: 0})"


class Call(NamedTuple):
    """What a linear returned, [B,T,H] or [T,B,H]; ``time_first`` where its input lies in memory as a [T,B,H] view."""

    output: Tensor
    time_first: bool


class QkvHooks:
    """Keeps the q, k and v of the last forward pass; `remove` gives the model back.

    Args:
        names: three linears in the order q, k, v, or one fused whose output is [q, k, v].
        heads: attention heads of the model.
        key_heads: heads of keys and values; default: as many as queries have.
        causal: whether a position reads only those before it.
        multiple: the model fills up texts on the right, to a multiple of so many tokens.

    Raises:
        SqatError: these heads do not divide the outputs of a fused linear.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        heads: int,
        key_heads: int | None = None,
        causal: bool = False,
        multiple: int = 1,
    ) -> None:
        self.model_name, self.names = type(model).__name__, tuple(names)
        self.heads, self.causal, self.multiple = heads, causal, multiple
        self.groups = heads // (key_heads or heads)
        self.widths = [get_linear(model, name).out_features for name in names]
        if len(names) == 1:
            self.widths = split_fused_width(names[0], self.widths[0], heads, heads // self.groups)
        self.calls: dict[str, list[Call]] = {}
        self.time_first = False
        self.handles: list[RemovableHandle] = [model.register_forward_pre_hook(self.forget)]
        for name in names:
            linear = model.get_submodule(name)
            # The first of its hooks: a fake quantizer may return a tensor that lies otherwise.
            self.handles.append(linear.register_forward_pre_hook(self.on_input, prepend=True))
            self.handles.append(linear.register_forward_hook(partial(self.on_output, name)))

    def forget(self, *_: object) -> None:
        """Drop what an earlier forward pass left (a forward pre-hook of the model)."""
        self.calls.clear()

    def on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Note how an input lies in memory (a forward pre-hook)."""
        x = args[0]
        self.time_first = x.dim() == 3 and x.stride(0) < x.stride(1)

    def on_output(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Keep an output, and give the model a copy: Longformer writes into it (a forward hook)."""
        self.calls.setdefault(name, []).append(Call(output, self.time_first))
        return output.clone()

    def pop(self, samples: int, tokens: int | None = None) -> QKV:
        """Return the tensors of the last forward pass, [B,T,H] each, and forget them.

        Args:
            tokens: T of a text; None for an image, which the model itself cuts into patches and windows.

        Raises:
            SqatError: a linear has not run, or not on these tokens.
        """
        outputs = [self.choose(name, samples, tokens) for name in self.names]
        self.forget()
        return self.to_qkv(*(outputs if len(outputs) == 3 else outputs[0].split(self.widths, dim=-1)))

    def choose(self, name: str, samples: int, tokens: int | None) -> Tensor:
        """Return the first output of a linear that belongs to the tokens; DeBERTa runs q and k on positions too."""
        calls = self.calls.get(name, [])
        for call in calls:
            found = batch_first(call, samples, None if tokens is None else tokens + -tokens % self.multiple)
            if found is not None:
                return found[:, :tokens]
        got = " and ".join(str(list(call.output.shape)) for call in calls) or "nothing"
        needed = f"[{samples}, {'patches' if tokens is None else tokens}, width]"
        raise SqatError(f"{self.model_name}: MiniLM distillation needs {needed} from {name}, which returned {got}",
                        INSTEAD, code="unsupported-model")  # fmt: skip

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


def batch_first(call: Call, samples: int, tokens: int | None) -> Tensor | None:
    """Return an output as [B,T,H], or None where it has other samples or tokens; an image has a row per window."""
    x = call.output
    if x.dim() != 3:
        return None
    first, second = x.shape[:2]
    fits = first % samples == 0 if tokens is None else (first, second) == (samples, tokens)
    fits_turned = second == samples and tokens in (None, first)
    if fits_turned and (call.time_first or not fits):
        return x.transpose(0, 1)
    return x if fits else None


def split_fused_width(name: str, width: int, heads: int, key_heads: int) -> list[int]:
    """Return how many outputs of a fused linear are q, k and v."""
    count = heads + 2 * key_heads
    if width % count:
        raise SqatError(f"{name} has {width} outputs, which are not q, k and v of {heads} and {key_heads} heads",
                        INSTEAD, code="unsupported-model")  # fmt: skip
    return [width // count * part for part in (heads, key_heads, key_heads)]


def repeat_heads(x: Tensor, heads: int, groups: int) -> Tensor:
    """Return [B,T,H/groups] as [B,T,H]: each head ``groups`` times, one behind the other."""
    return x if groups == 1 else x.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, dim=2).flatten(2)
