"""The choice of layers for a budget: within it as measured, and never fewer left out for a smaller one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from sqat.analyze.budget import Step, keep_within, list_steps, most_tries, worst_first
from sqat.analyze.sensitivity import Damages

DAMAGES = {"a": Damages(0.4, 0.1, 0.6), "b": Damages(0.2, None, 0.2), "c": Damages(None, 0.3, 0.3)}


def added(steps: Sequence[Step]) -> float:
    return sum(step.damage for step in steps)


def test_steps_come_worst_first() -> None:
    assert list_steps(DAMAGES) == [(0.4, "a", "pruned"), (0.3, "c", "int8"), (0.2, "b", "pruned"), (0.1, "a", "int8")]


def test_a_damage_that_is_no_number_comes_before_all() -> None:
    assert list_steps({**DAMAGES, "d": Damages(math.nan, None, math.nan)})[0].layer == "d"


def test_the_fewest_of_the_worst_steps_are_left_out() -> None:
    kept = keep_within(0.35, list_steps(DAMAGES), added)
    assert [(step.layer, step.kind) for step in kept.left_out] == [("a", "pruned"), ("c", "int8")]
    assert math.isclose(kept.measured, 0.3)
    assert math.isclose(kept.predicted, 0.3)


def test_a_budget_that_nothing_fits_leaves_everything_out() -> None:
    kept = keep_within(0.0, list_steps(DAMAGES), added)
    assert len(kept.left_out) == 4
    assert kept.measured == kept.predicted == 0.0


def test_what_is_measured_counts_and_not_the_sum() -> None:
    kept = keep_within(0.35, list_steps(DAMAGES), lambda steps: 3 * added(steps))
    assert [step.layer for step in kept.left_out] == ["a", "c", "b"]
    assert math.isclose(kept.measured, 0.3)
    assert math.isclose(kept.predicted, 0.1)


def erratic(seed: int, calls: list[int]) -> Callable[[Sequence[Step]], float]:
    """A damage that may fall where more is done, as real ones may, but is the same for the same steps."""

    def measure(steps: Sequence[Step]) -> float:
        calls.append(len(steps))
        return added(steps) * random.Random(f"{seed} {len(steps)}").uniform(0.2, 3.0)

    return measure


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 5), st.floats(0, 5), st.integers(0, 99))
def test_a_budget_is_kept_and_a_smaller_one_leaves_out_as_many(
    damages: list[float], one: float, other: float, seed: int
) -> None:
    steps = list_steps({f"l{number}": Damages(value, None, value) for number, value in enumerate(damages)})
    small, large = sorted((one, other))
    calls: list[int] = []
    tight, loose = (keep_within(budget, steps, erratic(seed, calls)) for budget in (small, large))
    for budget, kept in ((small, tight), (large, loose)):
        assert kept.measured <= budget
        assert kept.left_out == steps[: len(kept.left_out)]
        if rest := steps[len(kept.left_out) :]:
            assert kept.measured == erratic(seed, [])(rest)
    assert len(tight.left_out) >= len(loose.left_out)
    assert len(calls) <= 2 * most_tries(len(steps))


def test_what_is_no_number_comes_before_the_largest() -> None:
    values = sorted([0.5, math.nan, -1.0, math.inf, 2.0], key=worst_first)
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, 2.0, 0.5, -1.0]
