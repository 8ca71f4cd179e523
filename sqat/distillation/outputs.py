"""Distillation of what a model puts out, as tasks do it unless theirs needs another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of softened class distributions times T^2 (arXiv:1503.02531); squared error where there is one output."""
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    soft = F.log_softmax(student.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(soft, target, log_target=True, reduction="batchmean") * temperature**2
