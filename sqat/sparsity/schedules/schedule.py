"""What every schedule has: the sparsity of each mask, the steps at which masks are set, and the rule that sets them.

Torch is imported where tensors are handled only: recipes and reports ask schedules without it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern


class Schedule(ABC):
    """Base of all schedules; a subclass is a frozen dataclass whose fields are the keys of a recipe."""

    name: str
    regrow: bool = True  # whether a pruned weight may return
    decay: float = 0.0  # of pruned weights that go on learning

    @property
    def every_step(self) -> bool:
        """Whether a mask is chosen before every step, while pruned weights go on learning."""
        return False

    @abstractmethod
    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each mask; the last is ``pattern.sparsity``."""

    @abstractmethod
    def mask_steps(self, steps: int, recovery_fraction: float) -> dict[int, int]:
        """Return training step -> index of the sparsity that holds from it on.

        Args:
            steps: of training, at least 1.
            recovery_fraction: share of the steps after the last mask.
        """

    @abstractmethod
    def grow_mask(self, scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
        """Return the mask of one sparsity; scores are finite, or -inf where a weight is already pruned."""

    def choose_mask(
        self, scores: Tensor, pattern: Pattern, sparsity: float, previous: Tensor | None, dim: int = 1
    ) -> Tensor:
        """Return the next bool mask, in the shape of ``scores``, True where a weight is kept.

        Args:
            scores: finite, dimension ``dim`` a multiple of ``pattern.m``.
            sparsity: one of ``sparsities(pattern)``.
            previous: bool mask of the sparsity before, or None at the first.

        Raises:
            ValueError: shapes do not fit, a score is not finite, or the sparsity is out of range.
        """
        if not 0 <= sparsity <= pattern.sparsity:
            raise ValueError(f"sparsity {sparsity:g} is outside 0..{pattern.sparsity:g}, the range of {pattern}")
        if previous is not None and previous.shape != scores.shape:
            raise ValueError(f"previous mask {tuple(previous.shape)} and scores {tuple(scores.shape)} differ in shape")
        if not bool(scores.isfinite().all()):
            raise ValueError(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite")
        if self.regrow or previous is None:
            return self.grow_mask(scores, pattern, sparsity, dim)
        return self.grow_mask(scores.masked_fill(~previous, -math.inf), pattern, sparsity, dim) & previous

    def decay_loss(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return a scalar loss whose gradient is ``decay`` times each pruned weight."""
        from sqat.sparsity.masks import apply_mask

        return self.decay / 2 * apply_mask(weight, ~mask).square().sum()


def describe_skipped_masks(mask_steps: Mapping[int, int]) -> str:
    """Say how many masks fall on the step of a later one, which replaces them; empty where none does."""
    masks = 1 + max(mask_steps.values())
    skipped = masks - len(set(mask_steps.values()))
    return f"too few steps before the last mask: {skipped} of {masks} masks are skipped" if skipped else ""
