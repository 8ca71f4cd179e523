"""Rounds by a clock that the calls themselves move: who has its turn when, what is counted, when it ends."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sqat.bench.rounds import MIN_CALLS, MIN_ROUNDS, Effort, RoundTimes, time_rounds


class Clock:
    """Time that passes when a call or a sleep says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []
        self.random = np.random.default_rng(0)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.order.append("rest")

    def call(self, name: str, seconds: float, noise: float = 0.0) -> None:
        self.now += seconds * float(self.random.lognormal(0, noise))
        self.order.append(name)


def timed(clock: Clock, effort: Effort, noise: float = 0.0, **seconds: float) -> RoundTimes:
    calls = {name: lambda name=name, each=each: clock.call(name, each, noise) for name, each in seconds.items()}
    return time_rounds(calls, next(iter(seconds)), effort, clock=clock, sleep=clock.sleep)


def test_each_candidate_has_one_turn_a_round_after_a_rest_and_an_untimed_call() -> None:
    clock = Clock()
    found = timed(clock, Effort(rounds=6, seconds=0.0, limit=1e9), a=1.0, b=2.0, c=3.0)
    assert (found.rounds, found.reached) == (6, True)
    turns = "-".join(clock.order).split("rest-")[1:]
    names = [turn.rstrip("-").split("-") for turn in turns]
    assert {len(set(turn)) for turn in names} == {1}
    assert {len(turn) for turn in names} == {1 + MIN_CALLS}
    order = [turn[0] for turn in names]
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert all(Counter(each) == Counter("abc") for each in rounds)
    assert len(rounds) == 1 + 6, "the first is thrown away"
    assert len({tuple(each) for each in rounds}) > 1, "the order changes"


def test_turns_have_a_minimum_duration() -> None:
    found = timed(Clock(), Effort(rounds=3, seconds=1.0), quick=0.1, slow=5.0)
    assert {len(turn) for turn in found.calls["quick"]} <= {10, 11}
    assert {len(turn) for turn in found.calls["slow"]} == {MIN_CALLS}
    np.testing.assert_allclose(found.turns("slow"), 5.0)


def test_rounds_go_on_until_intervals_are_narrow() -> None:
    quiet = timed(Clock(), Effort(rounds=8, seconds=0.0, within=0.02, limit=1e9), noise=0.001, a=1.0, b=2.0)
    noisy = timed(Clock(), Effort(rounds=8, seconds=0.0, within=0.02, limit=1e9), noise=0.05, a=1.0, b=2.0)
    assert quiet.reached
    assert noisy.reached
    assert quiet.rounds == 8 < noisy.rounds


@pytest.mark.parametrize("alone", [True, False])
def test_the_time_limit_ends_the_rounds(alone: bool) -> None:
    others = {} if alone else {"b": 2.0}
    found = timed(Clock(), Effort(rounds=50, seconds=0.0, within=1e-6, limit=60.0), noise=0.3, a=1.0, **others)
    assert not found.reached
    assert MIN_ROUNDS <= found.rounds < 50


def test_the_smallest_limit_still_gives_an_interval() -> None:
    assert (
        timed(Clock(), Effort(rounds=50, seconds=0.0, within=1e-6, limit=1e-9), noise=0.3, a=1.0).rounds == MIN_ROUNDS
    )


def test_fewer_rounds_than_can_hold_the_median_are_not_enough() -> None:
    """The range of n draws holds the median with probability 1 - 2 ^ (1 - n): 93.75 % for 5, 96.9 % for 6."""
    assert 1 - 2.0 ** (1 - MIN_ROUNDS) > 0.95 > 1 - 2.0 ** (2 - MIN_ROUNDS)
    assert timed(Clock(), Effort(rounds=1, seconds=0.0, within=1.0, limit=1e9), a=1.0, b=2.0).rounds == MIN_ROUNDS
