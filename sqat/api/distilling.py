"""MiniLM distillation in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sqat.api.choices import Inputs, choose_part, model_inputs
from sqat.compress.losses import Relations, check_relations, real_positions
from sqat.data.dataset import Batch
from sqat.distillation import LOSSES, RelationLoss
from sqat.errors import SqatError
from sqat.models.attention import hook_last_qkv


@contextmanager
def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    loss: str | RelationLoss | Relations = "minilm-v2",
    *,
    qkv: Sequence[str] | None = None,
    teacher_qkv: Sequence[str] | None = None,
) -> Iterator[Callable[[Inputs], Tensor]]:
    """Catch q, k and v of the last block of student and teacher while a block of code trains the student.

    Args:
        model: the student.
        teacher: in eval mode, and another object; it gets no gradient.
        loss: a name, one of `sqat.distillation.LOSSES` with its settings, or any function of two `QKV`
            (student, teacher) and the attention mask [B,T] to a scalar.
        qkv: names of three linears, or one fused, of the student; default: found by their names.
        teacher_qkv: the same of the teacher.

    Yields:
        A function from the batch that the student has just seen to the loss, a scalar; it runs the teacher.

    Raises:
        SqatError: an unknown name, q, k and v that cannot be told, heads that do not fit the loss, or a teacher in
            training mode.
    """
    relations: Relations = choose_part("loss", loss, LOSSES, RelationLoss)
    check_teacher(model, teacher)
    student, taught = hook_last_qkv(model, qkv), hook_last_qkv(teacher, teacher_qkv)

    def of_batch(batch: Inputs) -> Tensor:
        if not student.outputs:
            raise SqatError("the student has not seen this batch", "call model(**batch) before")
        inputs = model_inputs(batch, next(teacher.parameters()).device)
        with torch.no_grad():
            teacher(**inputs)
        none = torch.empty(0)
        seen = student.take()
        return relations(seen, taught.take(), real_positions(Batch(inputs, none, none), seen))

    try:
        check_relations(relations, (student, taught), "give another loss")
        yield of_batch
    finally:
        student.remove()
        taught.remove()


def check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """A teacher is not the student, and says the same of a batch each time."""
    if teacher is model:
        raise SqatError("student and teacher are one model", "teach with a copy: copy.deepcopy(model).eval()")
    if teacher.training:
        raise SqatError("the teacher is in training mode", "call teacher.eval()")
