"""The choice of layers for a budget: within it as measured, and never fewer skipped for a smaller one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from sqat.analyze.budget import Step, largest_first, list_steps, max_tries, skip_steps
from sqat.analyze.findings import Sensitivity


def found(pruned: float | None, int8: float | None, both: float) -> Sensitivity:
    return Sensitivity(pruned=pruned, int8=int8, both=both)


LAYERS = {"a": found(0.4, 0.1, 0.6), "b": found(0.2, None, 0.2), "c": found(None, 0.3, 0.3)}


def add(steps: Sequence[Step]) -> float:
    return sum(step.sensitivity for step in steps)


def test_the_most_sensitive_steps_come_first() -> None:
    assert list_steps(LAYERS) == [(0.4, "a", "pruned"), (0.3, "c", "int8"), (0.2, "b", "pruned"), (0.1, "a", "int8")]


def test_nan_comes_before_all() -> None:
    assert list_steps({**LAYERS, "d": found(math.nan, None, math.nan)})[0].layer == "d"
    values = sorted([0.5, math.nan, -1.0, math.inf, 2.0], key=largest_first)
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, 2.0, 0.5, -1.0]


def test_the_fewest_of_the_most_sensitive_steps_are_skipped() -> None:
    skipped, measured = skip_steps(0.35, list_steps(LAYERS), add)
    assert [(step.layer, step.kind) for step in skipped] == [("a", "pruned"), ("c", "int8")]
    assert math.isclose(measured, 0.3)


def test_a_budget_of_nothing_skips_all_steps() -> None:
    skipped, measured = skip_steps(0.0, list_steps(LAYERS), add)
    assert (len(skipped), measured) == (4, 0.0)


def test_the_measured_value_counts_not_the_sum() -> None:
    skipped, measured = skip_steps(0.35, list_steps(LAYERS), lambda steps: 3 * add(steps))
    assert [step.layer for step in skipped] == ["a", "c", "b"]
    assert math.isclose(measured, 0.3)


def erratic(seed: int, calls: list[int]) -> Callable[[Sequence[Step]], float]:
    """A measure that may fall where more steps are taken, but is the same for the same steps."""

    def measure(steps: Sequence[Step]) -> float:
        calls.append(len(steps))
        return add(steps) * random.Random(f"{seed} {len(steps)}").uniform(0.2, 3.0)

    return measure


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 5), st.floats(0, 5), st.integers(0, 99))
def test_a_budget_is_kept_and_a_smaller_one_skips_as_many(
    values: list[float], one: float, other: float, seed: int
) -> None:
    steps = list_steps({f"l{number}": found(value, None, value) for number, value in enumerate(values)})
    small, large = sorted((one, other))
    calls: list[int] = []
    tight, loose = (skip_steps(budget, steps, erratic(seed, calls)) for budget in (small, large))
    for budget, (skipped, measured) in ((small, tight), (large, loose)):
        assert measured <= budget
        assert skipped == steps[: len(skipped)]
        if remaining := steps[len(skipped) :]:
            assert measured == erratic(seed, [])(remaining)
    assert len(tight[0]) >= len(loose[0])
    assert len(calls) <= 2 * max_tries(len(steps))
