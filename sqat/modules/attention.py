"""Attention with a hook on each operand of its two products: query, key, softmax and value.

The arithmetic is the family's own. `byte_attention` keeps the weight of a key as a byte, as the kernels of target
cpu-sparse do, and divides by the sum of the bytes.

Shapes: B batch, h heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqat.compat import eager_attention
from sqat.errors import SqatError
from sqat.modules.hooks import ATTENTION_HOOK
from sqat.modules.served_arithmetic import ATTENTION_STEP, LARGEST_BYTE, attend_as_kernels, is_masked
from sqat.quantization.fake_quant import round_straight_through

PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm})
ROUNDING = 1e-5  # of a weight, beside that to bytes
HINT = "calibrate with placement linear, which leaves attention in float"
# Arguments for other backends: eager attention reads what they say from the mask, or not at all.
WITHOUT_EFFECT = frozenset(
    {"is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "deterministic"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)


def hooked_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return what the family's own eager attention returns, with a hook on each operand of its two products.

    Raises:
        SqatError: the family has no such function, or the function has other products.
    """
    eager = own_eager(module)
    hook = getattr(module, ATTENTION_HOOK, None)  # only modules with a hook have it
    if hook is None:
        return eager(module, *args, **kwargs)
    with ProductWatcher(hook) as watcher:
        output = eager(module, *args, **kwargs)
    if watcher.count != 2:
        raise unsupported(
            module, f"computes {watcher.count} products of two activations, and sqat knows attention of 2"
        )
    return output


def own_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the eager attention function of a module's family, or refuse the module."""
    eager = eager_attention(module)
    if eager is None:
        raise unsupported(module, "has no eager attention function in its file")
    return eager


def unsupported(module: nn.Module, problem: str) -> SqatError:
    """Make the error for an attention whose products cannot be quantized."""
    return SqatError(f"{type(module).__name__} {problem}", HINT, code="unsupported-model")


class ProductWatcher(TorchFunctionMode):
    """Calls a hook on the operands of both products while an eager attention function runs.

    Attributes:
        count: products so far.
    """

    def __init__(self, hook: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.hook, self.count, self.dropped = hook, 0, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            args = self.scores(*args) if self.count == 0 else self.output(*args)
            self.count += 1
        elif function is nn.functional.dropout and self.count == 1:  # what it drops is not quantized
            args, self.dropped = (self.hook("softmax", args[0]), *args[1:]), True
        return function(*args, **(kwargs or {}))

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the first product, [B,h,T,d] and [B,h,d,S], through the hook."""
        return self.hook("query", query), self.hook("key", key.transpose(-2, -1)).transpose(-2, -1)

    def output(self, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands of the second product, [B,h,T,S] and [B,h,S,d], through the hook."""
        return weights if self.dropped else self.hook("softmax", weights), self.hook("value", value)


def byte_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention [B,T,h,d] and probabilities [B,h,T,S], softmax in bytes; a query without any key gets zeros.

    In eval mode the bits are those of the kernels.

    Raises:
        SqatError: the family hands over an argument that the kernels do not compute.
    """
    for name, argument in others.items():
        if argument is not None and name not in WITHOUT_EFFECT:
            raise unsupported(module, f"gets {name}, which the kernels of target cpu-sparse do not compute")
    if key.shape[1] != query.shape[1]:
        raise unsupported(module, "shares keys among heads, which the kernels of target cpu-sparse do not compute")
    hook = getattr(module, ATTENTION_HOOK, None)
    if hook is not None:
        query, key, value = hook("query", query), hook("key", key), hook("value", value)
    step = getattr(module, ATTENTION_STEP, None)
    if step is not None and not module.training:
        return attend_as_kernels(query, key, value, attention_mask, scaling_of(query, scaling), step)
    bytes_ = byte_weights(scores_of(query, key, attention_mask, scaling), attention_mask)
    total = bytes_.sum(-1, keepdim=True).clamp(min=1)
    dropped = nn.functional.dropout(bytes_, p=dropout, training=module.training).to(value.dtype)
    output = (torch.matmul(dropped, value) / total).to(value.dtype)
    return output.transpose(1, 2).contiguous(), bytes_ / total


def compared_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return what the family's eager attention returns, after a comparison with `byte_attention`.

    Raises:
        SqatError: they differ by more than bytes are rounded.
    """
    output, weights = own_eager(module)(module, *args, **kwargs)
    shares = byte_attention(module, *args, **kwargs)[1]
    largest = shares.amax(-1, keepdim=True)  # 255 of all bytes; 0 where a query has no key
    # Each byte is off by 1/2, and so is each summand of their sum.
    allowed = (0.5 + 0.5 * shares.shape[-1] * weights) * largest / LARGEST_BYTE + ROUNDING
    if not ((shares - weights).abs() <= allowed)[(largest > 0).expand_as(shares)].all():
        raise unsupported(module, "computes other weights than the kernels of target cpu-sparse")
    return output, weights


def scores_of(query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return scores [B,h,T,S], those of masked keys far below all others."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling_of(query, scaling)
    return scores if attention_mask is None else scores + attention_mask


def scaling_of(query: Tensor, scaling: float | None) -> float:
    """Return the factor of the scores; 1 / sqrt(d) unless the model gives another."""
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def byte_weights(scores: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return round(255 exp(s - max)) as floats with a straight-through gradient, 0 at masked keys."""
    largest = scores.detach().amax(-1, keepdim=True)  # moves numerator and denominator alike: no gradient
    weights = round_straight_through((scores - largest).float().exp() * LARGEST_BYTE)
    if attention_mask is None:
        return weights
    return weights.masked_fill(is_masked(attention_mask), 0.0)
