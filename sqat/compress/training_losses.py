"""The losses of training: the task's own, and distillation from a teacher beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sqat.data.batch import Batch
from sqat.distillation.hidden_states import hidden_loss
from sqat.distillation.outputs import OUTPUT_LOSSES, OutputLoss, similarities_loss
from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.models.attention import hook_last_qkv, token_multiple
from sqat.models.layer_selection import encoder_blocks
from sqat.modules import hidden_hooks
from sqat.modules.hidden_hooks import HiddenHooks
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
def distilled_loss(student: nn.Module, teacher: nn.Module | None, config: DistillConfig, task: Task) -> Iterator[Loss]:
    """Weighted sum of MiniLM relations, hidden states, outputs and task; a part of weight 0 is not computed.

    Args:
        teacher: gets no gradient; None where batches hold its outputs.
    """
    output_loss = OUTPUT_LOSSES[config.output_loss or task.output_losses[0]]
    with inner_losses(student, teacher, config) as inner:

        def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            logits = model(**batch.inputs).logits
            teacher_logits = batch.teacher_outputs
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher.to(logits.device)(**(batch.teacher_inputs or batch.inputs)).logits
            parts = {name: weight * part(batch.inputs) for name, (weight, part) in inner.items()}
            if config.output_weight:
                assert teacher_logits is not None  # one of the two has them
                check_widths(logits, teacher_logits, output_loss)
                outputs = output_loss(logits, teacher_logits, batch.groups, config.output_temperature)
                parts["logits"] = config.output_weight * outputs
            if config.task_weight:
                parts["task"] = config.task_weight * task.loss(logits, batch)
            return parts

        yield loss


def check_widths(student: Tensor, teacher: Tensor, output_loss: OutputLoss) -> None:
    """Refuse outputs of another width where the loss compares them number by number."""
    if student.shape != teacher.shape and output_loss is not similarities_loss:
        raise SqatError(f"the student's outputs have the shape {list(student.shape)}, the teacher's "
                        f"{list(teacher.shape)}", "for vectors of another width set output_loss: similarities",
                        "distill.teacher", code="model-mismatch")  # fmt: skip


@contextmanager
def inner_losses(
    student: nn.Module, teacher: nn.Module | None, config: DistillConfig
) -> Iterator[dict[str, tuple[float, Callable[[Inputs], Tensor]]]]:
    """Yield the weight and function of each loss on what the models compute inside, by its name."""
    with ExitStack() as stack:
        inner: dict[str, tuple[float, Callable[[Inputs], Tensor]]] = {}
        if teacher is not None and config.minilm_weight:
            relations = minilm_loss(student, teacher, config.loss, config.qkv, config.qkv)
            inner["minilm"] = config.minilm_weight, stack.enter_context(relations)
        if teacher is not None and config.hidden_weight:
            inner["hidden"] = config.hidden_weight, stack.enter_context(hidden_state_loss(student, teacher))
        yield inner


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
            raise not_seen()
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


@contextmanager
def hidden_state_loss(student: nn.Module, teacher: nn.Module) -> Iterator[Callable[[Inputs], Tensor]]:
    """Record the hidden states after each block of both models, and compare them.

    Yields:
        A function from the inputs that both models have just seen to the loss, a scalar.

    Raises:
        SqatError: a model without blocks, or models of other layers or widths.
    """
    student_hooks, teacher_hooks = hook_blocks(student), hook_blocks(teacher)

    def loss(inputs: Inputs) -> Tensor:
        if student_hooks.outputs is None:
            raise not_seen()
        samples, tokens = batch_shape(inputs)
        seen, taught = student_hooks.pop(samples, tokens), teacher_hooks.pop(samples, tokens)
        student_hooks.check_gradient(seen)
        try:
            return hidden_loss(seen, taught, None if tokens is None else inputs.get("attention_mask"))
        except ValueError as error:
            raise SqatError(str(error), hidden_hooks.INSTEAD, code="unsupported-model") from error

    try:
        yield loss
    finally:
        student_hooks.remove()
        teacher_hooks.remove()


def hook_blocks(model: nn.Module) -> HiddenHooks:
    """Hook the blocks of a model.

    Raises:
        SqatError: it has none.
    """
    blocks = encoder_blocks(model)
    if not blocks:
        raise SqatError(f"{type(model).__name__} has no blocks whose hidden states can be compared",
                        hidden_hooks.INSTEAD, code="unsupported-model")  # fmt: skip
    return HiddenHooks(model, blocks, token_multiple(model))


def not_seen() -> SqatError:
    """Make the error for a loss before the forward pass that it is about."""
    return SqatError("the student has not seen this batch", "call model(**batch) before the loss", code="usage")


def batch_shape(inputs: Inputs) -> tuple[int, int | None]:
    """Return the number of samples and of tokens; None for images."""
    texts = [inputs[name] for name in TEXT_INPUTS if name in inputs]
    first = texts[0] if texts else next(iter(inputs.values()))
    return first.shape[0], first.shape[1] if texts else None


TEXT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask")
