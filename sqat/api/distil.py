"""Distillation of what models compute inside, in a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite

import torch
from torch import Tensor, nn

from sqat.api.arguments import Inputs, choose_part, model_inputs
from sqat.compress.training_losses import RelationFn, hidden_state_loss, minilm_loss
from sqat.distillation import LOSSES, RelationLoss
from sqat.errors import SqatError
from sqat.models.conv1d import linears_for_conv1d


@contextmanager
def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    loss: str | RelationLoss | RelationFn = "minilm-v2",
    *,
    qkv: Sequence[str] | None = None,
    teacher_qkv: Sequence[str] | None = None,
    minilm_weight: float = 1.0,
    hidden_weight: float = 0.0,
) -> Iterator[Callable[[Inputs], Tensor]]:
    """Record what student and teacher compute inside, while a block of code trains the student.

    The loss compares the relations of q, k and v of the last block, and the hidden states after each block.

    Args:
        model: the student.
        teacher: another model, in eval mode; it gets no gradient.
        loss: a name, one of `sqat.distillation.LOSSES` with its settings, or any function of two `QKV`
            (student, teacher) and the attention mask [B,T] to a scalar.
        qkv: names of three linears of the student, or of a fused one; default: found by their names.
        teacher_qkv: the same of the teacher.
        minilm_weight: weight of the loss on q, k and v; of weight 0, they are not looked for.
        hidden_weight: weight of SquareHead (arXiv:2310.06927); both models have as many blocks of one width.

    Yields:
        A function from the batch that the student has just seen to the loss, a scalar; it runs the teacher.

    Raises:
        SqatError: an unknown name, q, k and v that are not found, heads or blocks that do not fit the loss, a teacher
            in training mode, or weights that are below 0 or all 0.
    """
    relations: RelationFn = choose_part("loss", loss, LOSSES, RelationLoss)
    if teacher is model:
        raise SqatError("student and teacher are one model", "teach with a copy: copy.deepcopy(model).eval()",
                        code="usage")  # fmt: skip
    if teacher.training:
        raise SqatError("the teacher is in training mode", "call teacher.eval()", code="usage")
    check_weights(minilm_weight=minilm_weight, hidden_weight=hidden_weight)
    with linears_for_conv1d(model), linears_for_conv1d(teacher), ExitStack() as stack:
        parts = []
        if minilm_weight:
            part = minilm_loss(model, teacher, relations, qkv, teacher_qkv)
            parts.append((minilm_weight, stack.enter_context(part)))
        if hidden_weight:
            parts.append((hidden_weight, stack.enter_context(hidden_state_loss(model, teacher))))

        def compute_loss(batch: Inputs) -> Tensor:
            inputs = model_inputs(batch, next(teacher.parameters()).device)
            with torch.no_grad():
                teacher(**inputs)
            return torch.stack([weight * part(inputs) for weight, part in parts]).sum()

        yield compute_loss


def check_weights(**weights: float) -> None:
    """Raise for weights of a loss that are below 0, not finite, or all 0."""
    for name, weight in weights.items():
        if not (isfinite(weight) and weight >= 0):
            raise SqatError(f"{name} is {weight}", "give a finite number of at least 0", code="usage")
    if not any(weights.values()):
        raise SqatError("every part of the loss has weight 0", f"set one of {', '.join(weights)}", code="usage")
