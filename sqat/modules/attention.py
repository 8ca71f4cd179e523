"""Attention with a hook on each operand of its two products: q, k, softmax and v.

The arithmetic is that of eager attention. `byte_attention` keeps the weight of a key as a byte, as the kernels of
target cpu-sparse do, and divides by the sum of the bytes.

Shapes: B batch, h heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sqat.modules.hooks import ATTENTION_HOOK
from sqat.modules.served_arithmetic import ATTENTION_STEP, LARGEST_BYTE, attend_as_kernels, is_masked
from sqat.quantization.fake_quant import round_straight_through


def hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention output [B,T,h,d] and probabilities [B,h,T,S].

    Grouped-query models pass fewer key and value heads; they are repeated before the products, as eager does.
    The keyword arguments are those of other backends (sliding windows come inside the mask).
    """
    hook = getattr(module, ATTENTION_HOOK, None)  # only modules with a hook have it
    query, key, value = hook_operands(hook, query, key, value)
    scores = scores_of(query, key, attention_mask, scaling)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if hook is not None:
        probabilities = hook("softmax", probabilities)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


def byte_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Do as `hooked_attention` with softmax in bytes; a query without any key gets zeros.

    In eval mode the bits are those of the kernels.
    """
    query, key, value = hook_operands(getattr(module, ATTENTION_HOOK, None), query, key, value)
    step = getattr(module, ATTENTION_STEP, None)
    if step is not None and not module.training:
        return attend_as_kernels(query, key, value, attention_mask, scaling_of(query, scaling), step)
    bytes_ = byte_weights(scores_of(query, key, attention_mask, scaling), attention_mask)
    total = bytes_.sum(-1, keepdim=True).clamp(min=1)
    dropped = nn.functional.dropout(bytes_, p=dropout, training=module.training).to(value.dtype)
    output = (torch.matmul(dropped, value) / total).to(value.dtype)
    return output.transpose(1, 2).contiguous(), bytes_ / total


def hook_operands(hook: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of every head, through the hook."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return (query, key, value) if hook is None else (hook("query", query), hook("key", key), hook("value", value))


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
