"""Relations between tokens, which MiniLM distils from the last attention layer.

A relation of two projections is softmax(A B^T / sqrt(d)) per head: a distribution over the keys for each query
position. Q, K and V are the outputs of their projections, before the fake quantizers of the attention products.

Shapes: B samples, T tokens, H width, A heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class QKV(NamedTuple):
    """Projections of one attention layer, each [B, T, H], heads side by side in H; ``causal`` in a decoder."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    causal: bool = False


def compare_relations(
    student: QKV,
    teacher: QKV,
    pairs: Sequence[tuple[str, str]],
    heads: int,
    attention_mask: Tensor,
    unit: str = "heads",
) -> Tensor:
    """Return KL(teacher || student) of relations, a scalar; the teacher gets no gradient.

    The divergences are summed over pairs and positions, divided by heads * real tokens of a sample, and averaged over
    samples. Pad keys are masked before the softmax and pad queries are dropped. Everything is computed in float32 at
    least, autocast or not.

    Args:
        pairs: names of the two projections of each relation.
        heads: into which the widths are split.
        attention_mask: [B, T], non-zero at real tokens.
        unit: what the heads are called in an error.

    Raises:
        ValueError: shapes do not fit, heads do not divide a width, or only one of the two is a decoder.
    """
    check_shapes(student, teacher, attention_mask, heads, unit)
    real = attention_mask.bool()
    hidden = ~real[:, None, None, :]
    if student.causal:  # a relation to a later token would teach what a decoder does not compute
        hidden = hidden | real.new_ones(real.shape[1], real.shape[1]).triu(1)
    total = student.query.new_zeros(real.shape, dtype=torch.float32)
    with torch.autocast(attention_mask.device.type, enabled=False):
        for first, second in pairs:
            with torch.no_grad():
                target = log_relation(getattr(teacher, first), getattr(teacher, second), heads, hidden)
                probability = target.exp()
            actual = log_relation(getattr(student, first), getattr(student, second), heads, hidden)
            total = total + (probability * (target - actual)).sum((1, 3))
        lengths = real.sum(1).clamp(min=1)
        return (total.masked_fill(~real, 0.0).sum(1) / (heads * lengths)).mean()


def check_shapes(student: QKV, teacher: QKV, attention_mask: Tensor, heads: int, unit: str) -> None:
    """Raise ValueError where two layers cannot be compared."""
    if student.causal != teacher.causal:
        decoder, encoder = ("student", "teacher") if student.causal else ("teacher", "student")
        raise ValueError(f"the {decoder} is a decoder and the {encoder} is not: their relations are of other positions")
    tokens = attention_mask.shape
    for who, qkv in (("student", student), ("teacher", teacher)):
        for name, x in (("query", qkv.query), ("key", qkv.key), ("value", qkv.value)):
            if x.dim() != 3 or x.shape[:2] != tokens:
                raise ValueError(f"{who} {name} {tuple(x.shape)} does not fit the attention mask {tuple(tokens)}")
            if x.shape[2] % heads:
                raise ValueError(f"{heads} {unit} do not divide the {who}'s {name} width {x.shape[2]}")


def log_relation(a: Tensor, b: Tensor, heads: int, hidden: Tensor) -> Tensor:
    """Return log softmax(A B^T / sqrt(d)) [B, A, T, T]; hidden keys get the lowest finite score, so probability 0."""
    a, b = split_heads(a, heads), split_heads(b, heads)
    scores = (a * (1 / math.sqrt(a.shape[-1]))) @ b.transpose(2, 3)
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return [B, T, H] as [B, A, T, H/A] in float32 (float64 stays)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
