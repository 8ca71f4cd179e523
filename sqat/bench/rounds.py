"""Interleaved timing: every candidate has one turn per round, until all ratios have narrow intervals.

Ratios compare turns of the same round, so a disturbance that lasts longer than a round slows both. The order within a
round is random. Rounds end when every 95 % interval is narrow enough, or at a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sqat.bench.intervals import Times, median_interval, median_ratio

Call = Callable[[], object]
REST = 0.02  # seconds before a turn: idle threads of other runtimes spin for a while
MIN_CALLS = 2  # per turn
MIN_ROUNDS = 6  # the range of fewer rounds holds the true median in less than 95 % of all measurements
CHECK_EVERY = 5  # rounds: an interval that is checked more often is too narrow


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at least, unless the limit comes first; at least `MIN_ROUNDS`.
        seconds: of timed calls per turn, at least.
        within: half-width of the 95 % interval of each ratio to reach, as a share of the ratio.
        limit: seconds per setting.
    """

    rounds: int = 10
    seconds: float = 0.05
    within: float = 0.02
    limit: float = 60.0


@dataclass(frozen=True)
class RoundTimes:
    """The times of one setting.

    Attributes:
        calls: candidate -> turn -> seconds of every timed call.
        reached: whether every interval is narrow enough.
    """

    calls: Mapping[str, list[list[float]]]
    reached: bool

    @property
    def rounds(self) -> int:
        return len(next(iter(self.calls.values())))

    def turns(self, name: str) -> Times:
        """Return the median call of every turn [R] of a candidate."""
        return np.array([np.median(turn) for turn in self.calls[name]])


def time_rounds(
    calls: Mapping[str, Call],
    baseline: str,
    effort: Effort,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> RoundTimes:
    """Time candidates in interleaved rounds; the first turns are not counted.

    Args:
        baseline: the candidate that ratios compare with.
        clock, sleep: replaced by tests.
    """
    random, names = np.random.default_rng(0), list(calls)
    for call in calls.values():
        time_turn(call, 0, clock, sleep)
    times, min_rounds = RoundTimes({name: [] for name in names}, False), max(effort.rounds, MIN_ROUNDS)
    start = clock()
    while True:
        for name in random.permutation(names):
            times.calls[str(name)].append(time_turn(calls[str(name)], effort.seconds, clock, sleep))
        is_late = clock() - start >= effort.limit and times.rounds >= MIN_ROUNDS
        is_check = times.rounds >= min_rounds and (times.rounds - min_rounds) % CHECK_EVERY == 0
        if is_late or is_check:
            reached = widest_interval(times, baseline) <= effort.within
            if is_late or reached:
                return RoundTimes(times.calls, reached)


def time_turn(call: Call, seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> list[float]:
    """Rest, warm up with one call, then return the seconds of each timed call."""
    sleep(REST)
    call()  # not timed: it brings the weights into the cache, as in a server
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < seconds:
        start = clock()
        call()
        times.append(clock() - start)
    return times


def widest_interval(times: RoundTimes, baseline: str) -> float:
    """Return the half-width of the widest interval of all ratios, or of the baseline's time if it is alone."""
    reference = times.turns(baseline)
    others = [name for name in times.calls if name != baseline]
    if not others:
        return median_interval(reference).half_width
    return max(median_ratio(reference, times.turns(name)).half_width for name in others)
