"""MiniLM distillation in a training loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sqat.api.arguments import Inputs, choose_part, model_inputs
from sqat.compress.training_losses import RelationFn, minilm_loss
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
) -> Iterator[Callable[[Inputs], Tensor]]:
    """Record q, k and v of the last block of student and teacher while a block of code trains the student.

    Args:
        model: the student.
        teacher: another model, in eval mode; it gets no gradient.
        loss: a name, one of `sqat.distillation.LOSSES` with its settings, or any function of two `QKV`
            (student, teacher) and the attention mask [B,T] to a scalar.
        qkv: names of three linears of the student, or of a fused one; default: found by their names.
        teacher_qkv: the same of the teacher.

    Yields:
        A function from the batch that the student has just seen to the loss, a scalar; it runs the teacher.

    Raises:
        SqatError: an unknown name, q, k and v that are not found, heads that do not fit the loss, or a teacher in
            training mode.
    """
    relations: RelationFn = choose_part("loss", loss, LOSSES, RelationLoss)
    if teacher is model:
        raise SqatError("student and teacher are one model", "teach with a copy: copy.deepcopy(model).eval()",
                        code="usage")  # fmt: skip
    if teacher.training:
        raise SqatError("the teacher is in training mode", "call teacher.eval()", code="usage")
    with (
        linears_for_conv1d(model),
        linears_for_conv1d(teacher),
        minilm_loss(model, teacher, relations, qkv, teacher_qkv) as relation_loss,
    ):

        def compute_loss(batch: Inputs) -> Tensor:
            inputs = model_inputs(batch, next(teacher.parameters()).device)
            with torch.no_grad():
                teacher(**inputs)
            return relation_loss(inputs)

        yield compute_loss
