"""At which training steps the masks of a schedule are set; asked by reports too, which need no torch for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from sqat.sparsity.settings import Schedule, SrSte


class Timed(Protocol):
    """How many sparsities there are, and what is left after the last: of a prune stage, or of a user's own loop."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def recover(self) -> float: ...


def mask_steps(config: Timed, steps: int) -> dict[int, int]:
    """Training step -> which of the schedule's sparsities holds from it on.

    Evenly spaced, the last when ``recover`` of the steps remain; schedule sr-ste chooses anew before every step.
    """
    schedule = config.schedule
    if isinstance(schedule, SrSte):
        return dict.fromkeys(range(max(1, round(schedule.until * steps))), 0)
    count = len(schedule.steps) if isinstance(schedule.steps, tuple) else schedule.steps
    last = min(steps - 1, round((1 - config.recover) * steps)) if count > 1 else 0
    return {round(i * last / max(1, count - 1)): i for i in range(count)}


def too_few_steps(moments: Mapping[int, int]) -> str:
    """What to say where several masks fall on one step, of which only the last is set; empty where none do."""
    planned = 1 + max(moments.values())
    left_out = planned - len(set(moments.values()))
    return f"too few steps before the last mask: {left_out} of {planned} masks are left out" if left_out else ""
