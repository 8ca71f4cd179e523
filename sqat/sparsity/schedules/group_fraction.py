"""Group-fraction: a growing share of the groups is N:M, the others are dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.sparsity.schedules.progressive import Progressive

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern


@dataclass(frozen=True)
class GroupFraction(Progressive):
    """A growing share of groups holds the whole pattern; the others are dense.

    The groups that would lose the smallest sum of scores come first.

    Attributes:
        num_masks: how many masks of evenly growing sparsity; or these sparsities, the last that of the pattern.
        regrow: whether pruned weights may return at the next mask.
    """

    name: Literal["group-fraction"] = "group-fraction"
    num_masks: int | tuple[float, ...] = 4

    def grow_mask(self, scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
        """Return the mask in which ``sparsity / pattern.sparsity`` of the groups are N:M."""
        from sqat.sparsity.masks import mark_smallest, rank_groups, split_groups

        pruned = split_groups(rank_groups(scores, pattern.m, dim), pattern.m, dim) >= pattern.n
        losses = split_groups(scores, pattern.m, dim).masked_fill(~pruned, 0.0).sum(dim + 1)
        count = round(sparsity / pattern.sparsity * losses.numel())
        return ~(pruned & mark_smallest(losses, count).unsqueeze(dim + 1)).flatten(dim, dim + 1)
