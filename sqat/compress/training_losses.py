"""The losses of training: the task's own, and distillation from a teacher beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.models.attention import hook_last_qkv
from sqat.recipe.stages import DistillConfig
from sqat.tasks import Task
from sqat.training.data_parallel import Loss

Inputs = Mapping[str, Tensor]
RelationFn = Callable[[QKV, QKV, Tensor], Tensor]  # student, teacher, attention mask [B,T] -> scalar


def task_loss(task: Task) -> Loss:
    """The task's loss on the labels."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": task.loss(model(**batch.inputs).logits, batch)}

    return loss


@contextmanager
def distilled_loss(student: nn.Module, teacher: nn.Module, config: DistillConfig, task: Task) -> Iterator[Loss]:
    """Weighted sum of MiniLM relations, outputs and task; a part of weight 0 is not computed.

    Args:
        teacher: gets no gradient.
    """
    qkv = config.qkv
    with (
        minilm_loss(student, teacher, config.loss, qkv, qkv) if config.minilm_weight else nullcontext() as relation_loss
    ):

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            logits = model(**batch.inputs).logits
            with torch.no_grad():
                teacher_logits = teacher.to(logits.device)(**batch.inputs).logits
            parts = {}
            if relation_loss is not None:
                parts["minilm"] = config.minilm_weight * relation_loss(batch.inputs)
            if config.output_weight:
                parts["logits"] = config.output_weight * task.output_loss(logits, teacher_logits, config.temperature)
            if config.task_weight:
                parts["task"] = config.task_weight * task.loss(logits, batch)
            return parts

        yield loss


@contextmanager
def minilm_loss(
    student: nn.Module,
    teacher: nn.Module,
    relations: RelationFn,
    student_qkv: Sequence[str] | None = None,
    teacher_qkv: Sequence[str] | None = None,
) -> Iterator[Callable[[Inputs], Tensor]]:
    """Record q, k and v of the last block of both models, and compare their relations.

    Args:
        student_qkv: names of three linears, or of a fused one; default: found by their names.

    Yields:
        A function from the inputs that both models have just seen to the loss, a scalar.

    Raises:
        SqatError: q, k and v are not found, or the heads of the models do not fit the loss.
    """
    student_hooks, teacher_hooks = hook_last_qkv(student, student_qkv), hook_last_qkv(teacher, teacher_qkv)

    def loss(inputs: Inputs) -> Tensor:
        if not student_hooks.outputs:
            raise SqatError("the student has not seen this batch", "call model(**batch) before the loss", code="usage")
        seen = student_hooks.pop()
        mask = inputs.get("attention_mask")  # images have none
        mask = seen.query.new_ones(seen.query.shape[:2]) if mask is None else mask
        return relations(seen, teacher_hooks.pop(), mask)

    try:
        try:  # before training, on two positions of zeros
            relations(student_hooks.zeros(2), teacher_hooks.zeros(2), torch.ones(1, 2))
        except ValueError as error:
            raise SqatError(str(error), "choose another distillation loss", code="unsupported-model") from error
        yield loss
    finally:
        student_hooks.remove()
        teacher_hooks.remove()
