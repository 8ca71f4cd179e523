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
from sqat.modules.qkv_hooks import INSTEAD
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

    def compare(student_qkv: QKV, teacher_qkv: QKV, mask: Tensor) -> Tensor:
        try:
            return relations(student_qkv, teacher_qkv, mask)
        except ValueError as error:
            raise SqatError(str(error), "choose another distillation loss", code="unsupported-model") from error

    def loss(inputs: Inputs) -> Tensor:
        if not student_hooks.calls:
            raise SqatError("the student has not seen this batch", "call model(**batch) before the loss", code="usage")
        samples, tokens = batch_shape(inputs)
        seen, taught = student_hooks.pop(samples, tokens), teacher_hooks.pop(samples, tokens)
        if torch.is_grad_enabled() and not seen.query.requires_grad:  # Reformer, reentrant checkpointing
            raise SqatError(f"{type(student).__name__} computes {student_hooks.names[0]} without a gradient",
                            INSTEAD, code="unsupported-model")  # fmt: skip
        mask = inputs.get("attention_mask")  # images have none
        return compare(seen, taught, seen.query.new_ones(seen.query.shape[:2]) if mask is None else mask)

    try:
        compare(student_hooks.zeros(2), teacher_hooks.zeros(2), torch.ones(1, 2))  # before training
        yield loss
    finally:
        student_hooks.remove()
        teacher_hooks.remove()


def batch_shape(inputs: Inputs) -> tuple[int, int | None]:
    """Return the number of samples and of tokens; None for images."""
    texts = [inputs[name] for name in TEXT_INPUTS if name in inputs]
    first = texts[0] if texts else next(iter(inputs.values()))
    return first.shape[0], first.shape[1] if texts else None


TEXT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask")
