"""SR-STE (arXiv:2102.04010): N:M from the first step on, chosen anew before every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqat.sparsity.schedules.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from sqat.sparsity.pattern import Pattern


@dataclass(frozen=True)
class SrSte(Schedule):
    """N:M chosen anew before every step; pruned weights learn too, and decay (SR-STE, arXiv:2102.04010).

    The gradient of the masked weight goes straight through to all weights.

    Attributes:
        decay: times a pruned weight is added to its gradient, so that masks settle.
        until: share of the steps after which the mask stays.
    """

    name: Literal["sr-ste"] = "sr-ste"
    decay: float = 2e-4
    until: float = 1.0

    @property
    def every_step(self) -> bool:
        """A mask is chosen before every step."""
        return True

    def __post_init__(self) -> None:
        if not (self.decay >= 0 and math.isfinite(self.decay)):
            raise ValueError(f"decay must be a number of at least 0, got {self.decay:g}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until:g}")

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the one sparsity of all steps."""
        return (pattern.sparsity,)

    def mask_steps(self, steps: int, recovery_fraction: float) -> dict[int, int]:
        """Choose a mask before every step of the share ``until``."""
        return dict.fromkeys(range(max(1, round(self.until * steps))), 0)

    def grow_mask(self, scores: Tensor, pattern: Pattern, sparsity: float, dim: int) -> Tensor:
        """Return the N:M mask of the scores."""
        from sqat.sparsity.masks import nm_mask

        return nm_mask(scores, pattern, dim)
