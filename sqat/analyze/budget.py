"""Which layers to leave dense or float, so that the sensitivity of the whole model stays within a budget.

Every layer's pruning and every layer's int8 is a step. Steps are skipped in the order of their own sensitivity, the
largest first. Bisection finds how many, measuring the whole model at each try, since sensitivities do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from sqat.analyze.findings import Sensitivity


class Step(NamedTuple):
    """One layer's pruning or its int8, and the sensitivity to it alone."""

    sensitivity: float
    layer: str
    kind: Literal["pruned", "int8"]


def list_steps(layers: Mapping[str, Sensitivity]) -> list[Step]:
    """All steps, the most sensitive first; NaN comes before all."""
    steps = [
        Step(sensitivity.pruned, name, "pruned")
        for name, sensitivity in layers.items()
        if sensitivity.pruned is not None
    ]
    steps += [
        Step(sensitivity.int8, name, "int8") for name, sensitivity in layers.items() if sensitivity.int8 is not None
    ]
    return sorted(steps, key=lambda step: largest_first(step.sensitivity))


def largest_first(sensitivity: float) -> tuple[bool, float]:
    """Sort key: NaN first, then the largest."""
    return not math.isnan(sensitivity), -sensitivity


def max_tries(steps: int) -> int:
    """How often `skip_steps` measures at most."""
    return steps.bit_length()


def skip_steps(
    budget: float, steps: Sequence[Step], measure: Callable[[Sequence[Step]], float]
) -> tuple[list[Step], float]:
    """Skip the fewest of the first steps so that the others, measured together, stay within the budget.

    Args:
        steps: the most sensitive first.
        measure: sensitivity of the model with the given steps taken; 0 without any.

    Returns:
        The skipped steps, and the sensitivity with the others taken.
    """
    low, high, measured = 0, len(steps), 0.0
    while low < high:
        middle = (low + high) // 2
        sensitivity = measure(steps[middle:])
        if sensitivity <= budget:
            high, measured = middle, sensitivity
        else:
            low = middle + 1
    return list(steps[:high]), measured
