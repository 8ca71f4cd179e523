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
    steps: int | tuple[float, ...] = 1
    regrow: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, int):
            if self.steps < 1:
                raise ValueError(f"steps must be at least 1, got {self.steps}")
            return
        growing = all(low < high for low, high in zip((0.0, *self.steps), self.steps, strict=False))
        if not self.steps or not growing or self.steps[-1] >= 1:
            raise ValueError(f"steps must be growing fractions between 0 and 1, got {list(self.steps)}")

    def sparsities(self, pattern: Pattern) -> tuple[float, ...]:
        """Return the sparsity of each mask; ValueError where the last is not that of the pattern."""
        target, steps = pattern.sparsity, self.steps
        if isinstance(steps, int):
            return (*(target * step / steps for step in range(1, steps)), target)
        if not math.isclose(steps[-1], target, abs_tol=1e-6):
            raise ValueError(f"steps must end at {target:g}, the sparsity of {pattern}, got {steps[-1]:g}")
        return (*steps[:-1], target)

    def mask_steps(self, steps: int, recover: float) -> dict[int, int]:
        """Space the masks evenly, the first at step 0, the last when ``recover`` of the steps remain."""
        count = self.steps if isinstance(self.steps, int) else len(self.steps)
        last = min(steps - 1, round((1 - recover) * steps)) if count > 1 else 0
        return {round(i * last / max(1, count - 1)): i for i in range(count)}
