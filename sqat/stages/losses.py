"""Losses of the stages that train: the task's own, and distillation from the dense ancestor beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqat.data import Batch
from sqat.errors import SqatError
from sqat.insertion.capture import Capture
from sqat.job import Job
from sqat.layers import find_qkv
from sqat.models import PreTrainedModel, attention_heads, build
from sqat.recipe import DistillConfig
from sqat.tasks import Task
from sqat.training import Loss


def task_loss(task: Task) -> Loss:
    """The task's loss on the labels."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"task": task.loss(model(**batch.inputs).logits, batch)}

    return loss


@contextmanager
def stage_loss(model: PreTrainedModel, config: DistillConfig | None, job: Job) -> Iterator[Loss]:
    """The task's loss, or with ``config`` the distilled one, while q, k and v of both models are caught."""
    if config is None:
        yield task_loss(job.task)
        return
    dense, _ = build(job.teacher())
    teacher: nn.Module = dense.requires_grad_(False)
    student_qkv = Capture(model, find_qkv(model, config.qkv), attention_heads(model))
    teacher_qkv = Capture(teacher, find_qkv(teacher, config.qkv), attention_heads(dense))
    check_relations(config, student_qkv, teacher_qkv, job)
    try:
        yield distilled_loss(config, job.task, teacher, student_qkv, teacher_qkv)
    finally:
        student_qkv.remove()
        teacher_qkv.remove()


def check_relations(config: DistillConfig, student: Capture, teacher: Capture, job: Job) -> None:
    """Try the loss on two empty positions, so that heads that do not fit are told before anything trains."""
    try:
        config.loss(student.blank(2), teacher.blank(2), torch.ones(1, 2))
    except ValueError as error:
        raise SqatError(str(error), f"change stages.{job.name}.distill.loss") from error


def distilled_loss(
    config: DistillConfig, task: Task, teacher: nn.Module, student_qkv: Capture, teacher_qkv: Capture
) -> Loss:
    """Weighted sum of MiniLM relations, logits and task; a part of weight 0 is not computed."""

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(**batch.inputs).logits
        with torch.no_grad():
            wanted = teacher.to(logits.device)(**batch.inputs).logits
        student, taught = student_qkv.take(), teacher_qkv.take()
        parts = {}
        if config.weight:
            parts["minilm"] = config.weight * config.loss(student, taught, batch.inputs["attention_mask"])
        if config.logits:
            parts["logits"] = config.logits * logit_loss(logits, wanted, config.temperature)
        if config.task:
            parts["task"] = config.task * task.loss(logits, batch)
        return parts

    return loss


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of softened class distributions times T^2 (arXiv:1503.02531); squared error where there is one output."""
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    soft = F.log_softmax(student.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(soft, target, log_target=True, reduction="batchmean") * temperature**2
