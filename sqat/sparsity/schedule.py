"""Progressive sparsity: the fractions on the way to N:M, and the mask at each of them.

Two ways to hold a fraction that no N:M pattern has: `per-group` takes equally many weights from every
group (0:4 -> 1:4 -> 2:4), `group-fraction` makes a growing share of groups N:M at once. Both take any
number of steps, choose first the groups that lose least (ties: the lower index), and prune among the
surviving weights: unless ``regrow`` is set, what is pruned stays pruned. The last step is exactly N:M, and
one-shot pruning is the schedule with one step. `sr-ste` goes another way: N:M from the first step on, but chosen
anew at each from weights that all keep learning. The schedules and their fractions are `sqat.sparsity.settings`.
Left out: schedules that know about time; when to move to the next fraction is the training stage's business.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sqat.sparsity.masks import apply_mask, group_ranks, nm_mask, split_groups
from sqat.sparsity.pattern import Pattern
from sqat.sparsity.settings import GroupFraction, PerGroup, Schedule, SrSte


def choose_mask(
    schedule: Schedule, scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None, dim: int = 1
) -> Tensor:
    """Return the bool mask of one step of a schedule, of the shape of ``scores``, True where kept.

    Args:
        scores: finite, any shape whose dimension ``dim`` is a multiple of ``pattern.m``.
        sparsity: between 0 and ``pattern.sparsity``, one of ``schedule.sparsities(pattern)``.
        previous: bool mask of the step before, or None at the first.

    Raises:
        ValueError: shapes do not fit, a score is not finite, or the sparsity is out of range.
    """
    _check_call(scores, pattern, sparsity, previous)
    if isinstance(schedule, SrSte):
        return nm_mask(scores, pattern, dim)  # whatever was pruned before
    before = None if schedule.regrow else previous
    if before is not None:
        scores = scores.masked_fill(~before, -math.inf)
    mask = _grown(schedule, scores, pattern, sparsity, dim)
    return mask if before is None else mask & before


def _grown(schedule: PerGroup | GroupFraction, scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
    match schedule:
        case PerGroup():
            return _per_group(scores, pattern, sparsity, dim)
        case GroupFraction():
            return _group_fraction(scores, pattern, sparsity, dim)


def _per_group(scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
    """The mask of ``round(sparsity * scores.numel())`` zeros, as many in every group as can be."""
    ranks = split_groups(group_ranks(scores, pattern.m, dim), pattern.m, dim)
    groups = scores.numel() // pattern.m
    zeros, extra = divmod(round(sparsity * scores.numel()), max(groups, 1))
    kept = pattern.m - zeros
    losses = split_groups(scores, pattern.m, dim).masked_fill(ranks != kept - 1, 0.0).sum(dim + 1)
    limits = kept - _cheapest(losses, extra).to(torch.uint8)
    return (ranks < limits.unsqueeze(dim + 1)).flatten(dim, dim + 1)


def _group_fraction(scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
    """The mask in which ``sparsity / pattern.sparsity`` of the groups are N:M."""
    pruned = split_groups(group_ranks(scores, pattern.m, dim), pattern.m, dim) >= pattern.n
    losses = split_groups(scores, pattern.m, dim).masked_fill(~pruned, 0.0).sum(dim + 1)
    count = round(sparsity / pattern.sparsity * losses.numel())
    return ~(pruned & _cheapest(losses, count).unsqueeze(dim + 1)).flatten(dim, dim + 1)


def decay_loss(schedule: SrSte, weight: Tensor, mask: Tensor) -> Tensor:
    """The loss [] whose gradient is ``schedule.decay`` times each pruned weight."""
    return schedule.decay / 2 * apply_mask(weight, ~mask).square().sum()


def _check_call(scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None) -> None:
    if not 0 <= sparsity <= pattern.sparsity:
        raise ValueError(f"sparsity {sparsity:g} is outside 0..{pattern.sparsity:g}, the range of {pattern}")
    if previous is not None and previous.shape != scores.shape:
        raise ValueError(f"previous mask {tuple(previous.shape)} and scores {tuple(scores.shape)} differ in shape")
    if not bool(scores.isfinite().all()):  # -inf marks what is already pruned
        raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite")


def _cheapest(losses: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest losses, the lower index first among equals."""
    chosen = torch.zeros(losses.numel(), dtype=torch.bool, device=losses.device)
    chosen[losses.flatten().sort(stable=True).indices[:count]] = True
    return chosen.view(losses.shape)
