"""Distillation of a model's outputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the KL of softened classes times T^2 (arXiv:1503.02531); the squared error of a single output.

    A single output is a score: the loss is the squared error then, without a temperature.

    Args:
        student: logits [..., classes]; the teacher's have the same shape.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    soft = F.log_softmax(student.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(soft, target, log_target=True, reduction="batchmean") * temperature**2


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cosine of embeddings [B, H], a scalar."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
