"""MiniLM: the student's last attention layer learns the teacher's relations between tokens.

A relation of two projections is softmax(A B^T / sqrt(d)) per head: a distribution over the keys for each
query position. v1 (arXiv:2002.10957) compares attention (Q, K) and value relations (V, V) head by head; v2
(arXiv:2012.15828) cuts Q, K and V anew into relation heads and compares QQ, KK and VV, so that only the
number of relation heads must divide both widths. Either loss is KL(teacher || student) at temperature 1,
summed over relations, divided by heads * |x| with |x| the real length of the sample, and averaged over
samples. Pad keys are masked before the softmax and pad queries dropped, on whichever side the padding is.
A decoder's relations are causal, all of them: position t is related to the positions up to t, which are all it can
ever read. A relation to a later one would teach what the model does not compute, and of the pairs (i, j) none is lost,
since each is met where the later of the two is the query.

Q, K and V are the outputs of their projections *before* the fake quantizers of the attention products: the
loss shapes what the projections compute, and the teacher, which has no quantizers, is read at the same place.
Everything is computed in float32 at least, autocast or not. Left out: relations of other layers than the one
handed in, temperatures other than 1 (the papers use none), and the windows of local attention.

Shapes: B samples, T tokens, H width, A heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sqat.distillation.settings import MiniLMLoss, MiniLMv1, MiniLMv2


class QKV(NamedTuple):
    """Projections of one attention layer, each [B, T, H], heads side by side in H; ``causal`` in a decoder."""

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    causal: bool = False


Relation = tuple[Tensor, Tensor, Tensor, Tensor]  # student's A and B, teacher's A and B


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H] -> [B, A, T, H/A] in float32 (float64 stays)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _log_relation(a: Tensor, b: Tensor, heads: int, hidden: Tensor) -> Tensor:
    """log softmax(A B^T / sqrt(d)) [B, A, T, T]; the lowest finite score gives hidden keys probability 0."""
    a, b = _split_heads(a, heads), _split_heads(b, heads)
    scores = (a * (1 / math.sqrt(a.shape[-1]))) @ b.transpose(2, 3)
    return scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)


def _divergence(relations: tuple[Relation, ...], heads: int, attention_mask: Tensor, causal: bool) -> Tensor:
    """Sum KL(teacher || student) over relations, heads and positions; see the module for the reduction."""
    real = attention_mask.bool()
    hidden = ~real[:, None, None, :]
    if causal:
        hidden = hidden | real.new_ones(real.shape[1], real.shape[1]).triu(1)
    total = relations[0][0].new_zeros(real.shape, dtype=torch.float32)
    with torch.autocast(attention_mask.device.type, enabled=False):
        for student_a, student_b, teacher_a, teacher_b in relations:
            with torch.no_grad():
                teacher = _log_relation(teacher_a, teacher_b, heads, hidden)
                probability = teacher.exp()
            student = _log_relation(student_a, student_b, heads, hidden)
            total = total + (probability * (teacher - student)).sum((1, 3))
        lengths = real.sum(1).clamp(min=1)
        return (total.masked_fill(~real, 0.0).sum(1) / (heads * lengths)).mean()


def _check(student: QKV, teacher: QKV, attention_mask: Tensor, heads: int, what: str) -> None:
    if student.causal != teacher.causal:
        decoder, encoder = ("student", "teacher") if student.causal else ("teacher", "student")
        raise ValueError(f"the {decoder} is a decoder and the {encoder} is not: their relations are of other positions")
    tokens = attention_mask.shape
    for who, qkv in (("student", student), ("teacher", teacher)):
        for name, x in (("query", qkv.query), ("key", qkv.key), ("value", qkv.value)):
            if x.dim() != 3 or x.shape[:2] != tokens:
                raise ValueError(f"{who} {name} {tuple(x.shape)} does not fit the attention mask {tuple(tokens)}")
            if x.shape[2] % heads:
                raise ValueError(f"{heads} {what} do not divide the {who}'s {name} width {x.shape[2]}")


def relation_loss(loss: MiniLMLoss, student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
    """Return the loss, a scalar; the teacher gets no gradient.

    Args:
        attention_mask: [B, T], non-zero at real tokens.

    Raises:
        ValueError: the head counts differ (v1), ``relation_heads`` does not divide both widths (v2), shapes do not fit,
            or one of both is a decoder.
    """
    match loss:
        case MiniLMv1():
            return _attention_and_values(student, teacher, attention_mask)
        case MiniLMv2():
            heads = teacher.heads if loss.relation_heads is None else loss.relation_heads
            _check(student, teacher, attention_mask, heads, "relation heads")
            relations = (
                (student.query, student.query, teacher.query, teacher.query),
                (student.key, student.key, teacher.key, teacher.key),
                (student.value, student.value, teacher.value, teacher.value),
            )
            return _divergence(relations, heads, attention_mask, student.causal)


def _attention_and_values(student: QKV, teacher: QKV, attention_mask: Tensor) -> Tensor:
    if student.heads != teacher.heads:
        raise ValueError(
            f"minilm-v1 needs equal head counts, got {student.heads} in the student and "
            f"{teacher.heads} in the teacher; minilm-v2 does not"
        )
    _check(student, teacher, attention_mask, student.heads, "heads")
    relations = (
        (student.query, student.key, teacher.query, teacher.key),
        (student.value, student.value, teacher.value, teacher.value),
    )
    return _divergence(relations, student.heads, attention_mask, student.causal)
