"""Settings and steps of the schedules that set a few masks on the way to N:M."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sqat.sparsity.pattern import Pattern
from sqat.sparsity.schedules.schedule import Schedule


@dataclass(frozen=True)
class Progressive(Schedule):
    """Masks of growing sparsity, evenly spaced over the steps before the recovery; one mask prunes at once."""

    name: str = ""
    num_masks: int | tuple[float, ...] = 2
    regrow: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_masks, int):
            if self.num_masks < 1:
                raise ValueError(f"num_masks must be at least 1, got {self.num_masks}")
            return
        growing = all(low < high for low, high in zip((0.0, *self.num_masks), self.num_masks, strict=False))
        if not self.num_masks or not growing or self.num_masks[-1] >= 1:
            raise ValueError(f"num_masks must be growing fractions between 0 and 1, got {list(self.num_masks)}")

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each mask; ValueError where the last is not that of the pattern."""
        target, masks = pattern.sparsity, self.num_masks
        if isinstance(masks, int):
            return (*(target * mask / masks for mask in range(1, masks)), target)
        if not math.isclose(masks[-1], target, abs_tol=1e-6):
            raise ValueError(f"num_masks must end at {target:g}, the sparsity of {pattern}, got {masks[-1]:g}")
        return (*masks[:-1], target)

    def mask_steps(self, steps: int, recovery_fraction: float) -> dict[int, int]:
        """Space the masks evenly, the first at step 0, the last when ``recovery_fraction`` of the steps remain."""
        count = self.num_masks if isinstance(self.num_masks, int) else len(self.num_masks)
        last = min(steps - 1, round((1 - recovery_fraction) * steps)) if count > 1 else 0
        return {round(i * last / max(1, count - 1)): i for i in range(count)}
