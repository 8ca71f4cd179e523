"""Progressive sparsity: the fractions on the way to N:M, and the mask at each of them.

Two ways to hold a fraction that no N:M pattern has: `per-group` takes equally many weights from every
group (0:4 -> 1:4 -> 2:4), `group-fraction` makes a growing share of groups N:M at once. Both take any
number of steps, choose first the groups that lose least (ties: the lower index), and prune among the
surviving weights: unless ``regrow`` is set, what is pruned stays pruned. The last step is exactly N:M, and
one-shot pruning is the schedule with one step. `sr-ste` goes another way: N:M from the first step on, but chosen
anew at each from weights that all keep learning. Left out: schedules that know about time; when to move to the
next fraction is the training stage's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sqat.sparsity.masks import Pattern, apply_mask, group_ranks, nm_mask, split_groups

Steps = int | tuple[float, ...]


def _check_steps(steps: Steps) -> None:
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return
    growing = all(low < high for low, high in zip((0.0, *steps), steps, strict=False))
    if not steps or not growing or steps[-1] >= 1:
        raise ValueError(f"steps must be growing fractions between 0 and 1, got {list(steps)}")


def _fractions(steps: Steps, pattern: Pattern) -> tuple[float, ...]:
    target = pattern.sparsity
    if isinstance(steps, int):
        return (*(target * step / steps for step in range(1, steps)), target)
    if not math.isclose(steps[-1], target, abs_tol=1e-6):
        raise ValueError(f"steps must end at {target:g}, the sparsity of {pattern}, got {steps[-1]:g}")
    return (*steps[:-1], target)


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


@dataclass(frozen=True)
class PerGroup:
    """The same number of zeros in every group, or one more in those whose next weight is smallest.

    ``steps`` is a number of equal steps, or the growing sparsities themselves, the last that of the pattern.
    """

    name: Literal["per-group"] = "per-group"
    steps: Steps = 2
    regrow: bool = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each step; the last is ``pattern.sparsity``."""
        return _fractions(self.steps, pattern)

    def __call__(
        self, scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None, dim: int = 1
    ) -> Tensor:
        """Return the mask of ``round(sparsity * scores.numel())`` zeros.

        Args:
            scores: finite, any shape whose dimension ``dim`` is a multiple of ``pattern.m``.
            sparsity: between 0 and ``pattern.sparsity``.
            previous: bool mask of the step before, or None at the first.

        Raises:
            ValueError: shapes do not fit, a score is not finite, or the sparsity is out of range.
        """
        _check_call(scores, pattern, sparsity, previous)
        if previous is not None and not self.regrow:
            scores = scores.masked_fill(~previous, -math.inf)
        ranks = split_groups(group_ranks(scores, pattern.m, dim), pattern.m, dim)
        groups = scores.numel() // pattern.m
        zeros, extra = divmod(round(sparsity * scores.numel()), max(groups, 1))
        kept = pattern.m - zeros
        losses = split_groups(scores, pattern.m, dim).masked_fill(ranks != kept - 1, 0.0).sum(dim + 1)
        limits = kept - _cheapest(losses, extra).to(torch.uint8)
        mask = (ranks < limits.unsqueeze(dim + 1)).flatten(dim, dim + 1)
        return mask if previous is None or self.regrow else mask & previous


@dataclass(frozen=True)
class GroupFraction:
    """A growing share of groups holds the whole pattern; the others are dense.

    ``steps`` as in `PerGroup`; a group loses the sum of the scores it would give up.
    """

    name: Literal["group-fraction"] = "group-fraction"
    steps: Steps = 4
    regrow: bool = False

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each step; the last is ``pattern.sparsity``."""
        return _fractions(self.steps, pattern)

    def __call__(
        self, scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None, dim: int = 1
    ) -> Tensor:
        """Return the mask in which ``sparsity / pattern.sparsity`` of the groups are N:M.

        Arguments and errors as in `PerGroup`.
        """
        _check_call(scores, pattern, sparsity, previous)
        if previous is not None and not self.regrow:
            scores = scores.masked_fill(~previous, -math.inf)
        pruned = split_groups(group_ranks(scores, pattern.m, dim), pattern.m, dim) >= pattern.n
        losses = split_groups(scores, pattern.m, dim).masked_fill(~pruned, 0.0).sum(dim + 1)
        count = round(sparsity / pattern.sparsity * losses.numel())
        mask = ~(pruned & _cheapest(losses, count).unsqueeze(dim + 1)).flatten(dim, dim + 1)
        return mask if previous is None or self.regrow else mask & previous


@dataclass(frozen=True)
class SrSte:
    """N:M chosen anew before every step; pruned weights learn too, and decay (SR-STE, arXiv:2102.04010).

    The gradient of the masked weight goes straight through to all weights, and pruned ones get ``decay`` times
    themselves on top, so that masks settle. After the share ``until`` of
    the steps the mask stays.
    """

    name: Literal["sr-ste"] = "sr-ste"
    decay: float = 2e-4
    until: float = 1.0

    def __post_init__(self) -> None:
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be a number of at least 0, got {self.decay:g}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until:g}")

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """The one sparsity of all steps."""
        return (pattern.sparsity,)

    def __call__(
        self, scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None, dim: int = 1
    ) -> Tensor:
        """Return the N:M mask of the scores, whatever was pruned before.

        Arguments and errors as in `PerGroup`.
        """
        _check_call(scores, pattern, sparsity, previous)
        return nm_mask(scores, pattern, dim)

    def penalty(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The loss [] whose gradient is ``decay`` times each pruned weight."""
        return self.decay / 2 * apply_mask(weight, ~mask).square().sum()


Schedule = PerGroup | GroupFraction | SrSte
