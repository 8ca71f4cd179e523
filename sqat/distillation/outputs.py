"""Distillation of a model's outputs: a function a name, each of all outputs of a batch.

Each takes outputs [B, ...] of student and teacher, the number of each row's query [B] and the temperature, and returns
a scalar. The teacher gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

OutputLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def kl_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the KL of softened classes times T^2 (arXiv:1503.02531)."""
    soft = F.log_softmax(student.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(soft, target, log_target=True, reduction="batchmean") * temperature**2


def mse_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the mean squared error of scores or pictures."""
    return F.mse_loss(student.float(), teacher.float())


def listwise_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the KL of the softmax over the scores [B, 1] of a query's candidates, times T^2, mean over queries.

    Queries with one candidate do not count (arXiv:2603.03010).
    """
    members = groups.unique()[:, None] == groups
    members = members[members.sum(1) > 1]
    soft, target = (masked_log_softmax(x.float().T / temperature, members) for x in (student, teacher))
    return divergence(soft, target, members) / max(len(members), 1) * temperature**2


def margin_mse_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the squared error of score differences, mean over all pairs of one query (arXiv:2010.02666)."""
    error = (student.float() - teacher.float()).squeeze(1)
    pairs = (groups[:, None] == groups).triu(1)
    loss: Tensor = ((error[:, None] - error).square() * pairs).sum() / pairs.sum().clamp(min=1)
    return loss


def cosine_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the mean of 1 - cosine of embeddings [B, H]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def l2_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the mean distance of embeddings [B, H] (arXiv:2509.12539)."""
    distances: Tensor = torch.linalg.vector_norm(student.float() - teacher.float(), dim=-1)
    return distances.mean()


def similarities_loss(student: Tensor, teacher: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Return the KL of the softmax over the cosines of each text to the batch's other texts, mean over texts.

    Embeddings [B, H] of the two may have other widths. A text's cosine to itself teaches nothing.
    """
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    with torch.autocast(student.device.type, enabled=False):
        units = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
        soft, target = (masked_log_softmax(x @ x.T / temperature, others) for x in units)
    return divergence(soft, target, others) / len(others)


def masked_log_softmax(scores: Tensor, members: Tensor) -> Tensor:
    """Return the log softmax of each row [.., B] over its members [R, B]."""
    return scores.expand(members.shape).masked_fill(~members, torch.finfo(scores.dtype).min).log_softmax(-1)


def divergence(soft: Tensor, target: Tensor, members: Tensor) -> Tensor:
    """Return the sum of KL(target || soft) over rows of log probabilities."""
    target = target.detach()
    return (target.exp() * (target - soft)).masked_fill(~members, 0.0).sum()


OUTPUT_LOSSES: dict[str, OutputLoss] = {
    "kl": kl_loss,
    "mse": mse_loss,
    "listwise": listwise_loss,
    "margin-mse": margin_mse_loss,
    "cosine": cosine_loss,
    "l2": l2_loss,
    "similarities": similarities_loss,
}
