"""Which layers to leave dense or float, so that the whole model's damage stays within a budget.

Every layer's pruning and every layer's int8 is a step that can be left out. They are left out in the order of the
damage each does alone, the worst first, and how many have to be is found by bisection on the damage of the whole
model, measured at each try: damages do not add up, so their sum is told but not trusted. The tries are as many as the
digits of the number of steps in base 2, and a smaller budget never leaves out fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sqat.analyze.sensitivity import Damages


class Step(NamedTuple):
    """One layer's pruning or its int8, and the damage it does alone."""

    damage: float
    layer: str
    kind: Literal["pruned", "int8"]


@dataclass(frozen=True)
class Kept:
    """The steps left out, and the damage of the others: the sum of what they do alone, and as measured together."""

    left_out: list[Step]
    predicted: float
    measured: float


def list_steps(damages: Mapping[str, Damages]) -> list[Step]:
    """All steps, the most damaging first; what is not a number comes before all."""
    steps = [Step(damage.pruned, name, "pruned") for name, damage in damages.items() if damage.pruned is not None]
    steps += [Step(damage.int8, name, "int8") for name, damage in damages.items() if damage.int8 is not None]
    return sorted(steps, key=lambda step: worst_first(step.damage))


def worst_first(damage: float) -> tuple[bool, float]:
    """Key that sorts the largest damage first, and before it what is not a number."""
    return not math.isnan(damage), -damage


def most_tries(steps: int) -> int:
    """How often `keep_within` measures at most."""
    return steps.bit_length()


def keep_within(budget: float, steps: Sequence[Step], measure: Callable[[Sequence[Step]], float]) -> Kept:
    """Leave out the fewest of the first steps so that the others, measured together, stay within the budget.

    Args:
        steps: the most damaging first.
        measure: damage of the model with the given steps done; without any it is 0.
    """
    low, high, measured = 0, len(steps), 0.0
    while low < high:
        middle = (low + high) // 2
        damage = measure(steps[middle:])
        if damage <= budget:
            high, measured = middle, damage
        else:
            low = middle + 1
    return Kept(list(steps[:high]), sum(step.damage for step in steps[high:]), measured)
