"""Attention with a tap on each operand of its two products: q, k, softmax and v.

The arithmetic is that of eager attention; transformers calls it through its attention interface (registered
in `sqat.models`), so no model code is copied. A module without a tap runs it unchanged.

Shapes: B batch, h heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sqat.insertion.taps import ATTENTION_TAP


def tapped_attention(
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
    The keyword arguments are those of other backends (sliding windows reach us inside the mask).
    """
    tap = getattr(module, ATTENTION_TAP, None)  # set on some modules only, and only while tapped
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if tap is not None:
        query, key, value = tap("query", query), tap("key", key), tap("value", value)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if tap is not None:
        probabilities = tap("softmax", probabilities)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities
