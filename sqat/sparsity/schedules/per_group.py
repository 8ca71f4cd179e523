"""Per-group: every group loses equally many weights (0:4 -> 1:4 -> 2:4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.sparsity.schedules.progressive import Progressive

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern


@dataclass(frozen=True)
class PerGroup(Progressive):
    """The same number of zeros in every group, or one more in those whose next weight is smallest.

    Attributes:
        num_masks: how many masks of evenly growing sparsity; or these sparsities, the last that of the pattern.
        regrow: whether pruned weights may return at the next mask.
    """

    name: Literal["per-group"] = "per-group"

    def grow_mask(self, scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
        """Return the mask of ``round(sparsity * scores.numel())`` zeros, as many in every group as possible."""
        import torch

        from sqat.sparsity.masks import mark_smallest, rank_groups, split_groups

        ranks = split_groups(rank_groups(scores, pattern.m, dim), pattern.m, dim)
        groups = scores.numel() // pattern.m
        zeros, extra = divmod(round(sparsity * scores.numel()), max(groups, 1))
        kept = pattern.m - zeros
        losses = split_groups(scores, pattern.m, dim).masked_fill(ranks != kept - 1, 0.0).sum(dim + 1)
        limits = kept - mark_smallest(losses, extra).to(torch.uint8)
        return (ranks < limits.unsqueeze(dim + 1)).flatten(dim, dim + 1)
