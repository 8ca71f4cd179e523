"""Losses of the stages that train: the task's own, and distillation from the dense ancestor beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sqat.checkpoint.store import Checkpoint
from sqat.data.dataset import Batch
from sqat.distillation.relations import QKV
from sqat.errors import SqatError
from sqat.models.attention import hook_last_qkv
from sqat.models.loading import build
from sqat.modules.qkv_hooks import Capture
from sqat.recipe.stages import DistillConfig
from sqat.tasks import Task
from sqat.training.data_parallel import Loss


def task_loss(task: Task) -> Loss:
    """The task's loss on the labels."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": task.loss(model(**batch.inputs).logits, batch)}

    return loss


@contextmanager
def stage_loss(
    model: nn.Module, config: DistillConfig | None, task: Task, load_teacher: Callable[[], Checkpoint], stage: str
) -> Iterator[Loss]:
    """The task's loss, or with ``config`` the distilled one, while q, k and v of both models are caught."""
    if config is None:
        yield task_loss(task)
        return
    teacher, _ = build(load_teacher())
    teacher.requires_grad_(False)
    captures = [hook_last_qkv(network, config.qkv) for network in (model, teacher)] if config.minilm_weight else []
    try:
        check_relations(config.loss, captures, f"change stages.{stage}.distill.loss")
        yield distilled_loss(config, task, teacher, captures)
    finally:
        for capture in captures:
            capture.remove()


Relations = Callable[[QKV, QKV, Tensor], Tensor]


def check_relations(loss: Relations, captures: Sequence[Capture], hint: str) -> None:
    """Try the loss on two empty positions, so that heads that do not fit are told before anything trains."""
    if not captures:
        return
    student, teacher = captures
    try:
        loss(student.blank(2), teacher.blank(2), torch.ones(1, 2))
    except ValueError as error:
        raise SqatError(str(error), hint) from error


def distilled_loss(config: DistillConfig, task: Task, teacher: nn.Module, captures: Sequence[Capture]) -> Loss:
    """Weighted sum of MiniLM relations, outputs and task; a part of weight 0 is not computed.

    Args:
        captures: of the student and of the teacher; none where ``config.minilm_weight`` is 0.
    """

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**batch.inputs).logits
        with torch.no_grad():
            wanted = teacher.to(logits.device)(**batch.inputs).logits
        parts = {}
        if captures:
            student, taught = (capture.take() for capture in captures)
            relations = config.loss(student, taught, real_positions(batch, student))
            parts["minilm"] = config.minilm_weight * relations
        if config.output_weight:
            parts["logits"] = config.output_weight * task.output_loss(logits, wanted, config.temperature)
        if config.task_weight:
            parts["task"] = config.task_weight * task.loss(logits, batch)
        return parts

    return loss


def real_positions(batch: Batch, caught: QKV) -> Tensor:
    """The attention mask [B,T]; ones where nothing is padded (images)."""
    mask = batch.inputs.get("attention_mask")
    return caught.query.new_ones(caught.query.shape[:2]) if mask is None else mask
