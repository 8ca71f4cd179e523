"""Timing that compares: every candidate has a turn in each round, until the ratios are known well enough.

Ratios are of turns of the same round, so that whatever slows the machine for longer than a round slows both. The order
within a round is drawn anew. A turn begins with a rest, since idle threads of other runtimes spin for a while, and with
one call that is not timed, so that each candidate finds its own weights in the cache, as a server would. The first
round is thrown away.

Rounds go on until the 95 % interval of every ratio is within a share of it, or a time limit; which of the two is
reported. Looking at an interval in order to stop makes it a little too narrow: it is looked at every fifth round. There
are six rounds in any case: the whole range of fewer holds the true median in less than 95 % of all measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sqat.bench.intervals import Times, median_interval, median_ratio

Call = Callable[[], object]
REST = 0.02
CALLS = 2  # of a turn, at least
FEWEST, LOOK_EVERY = 6, 5


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at least, unless the limit comes first; `FEWEST` in any case.
        seconds: of timed calls a turn, at least.
        within: half-width of the 95 % interval of each ratio that is enough, as a share of the ratio.
        limit: seconds of a setting.
    """

    rounds: int = 10
    seconds: float = 0.05
    within: float = 0.02
    limit: float = 60.0


@dataclass(frozen=True)
class Timed:
    """What a setting's rounds gave.

    Attributes:
        calls: candidate -> seconds of every timed call, turn by turn.
        reached: whether every interval is as narrow as asked for.
    """

    calls: Mapping[str, list[list[float]]]
    reached: bool

    @property
    def rounds(self) -> int:
        return len(next(iter(self.calls.values())))

    def turns(self, name: str) -> Times:
        """Median call [R] of every turn of a candidate."""
        return np.array([np.median(turn) for turn in self.calls[name]])


def time_rounds(
    calls: Mapping[str, Call],
    baseline: str,
    effort: Effort,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Timed:
    """Time candidates against each other.

    Args:
        baseline: the candidate that ratios are against.
    """
    random, names = np.random.default_rng(0), list(calls)
    for call in calls.values():
        take_turn(call, 0, clock, sleep)
    timed, fewest = Timed({name: [] for name in names}, False), max(effort.rounds, FEWEST)
    begun = clock()
    while True:
        for name in random.permutation(names):
            timed.calls[str(name)].append(take_turn(calls[str(name)], effort.seconds, clock, sleep))
        late = clock() - begun >= effort.limit and timed.rounds >= FEWEST
        enough = timed.rounds >= fewest and (timed.rounds - fewest) % LOOK_EVERY == 0
        if late or enough:
            reached = widest(timed, baseline) <= effort.within
            if late or reached:
                return Timed(timed.calls, reached)


def take_turn(call: Call, seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> list[float]:
    """Seconds of the timed calls of one turn."""
    sleep(REST)
    call()
    times: list[float] = []
    while len(times) < CALLS or sum(times) < seconds:
        start = clock()
        call()
        times.append(clock() - start)
    return times


def widest(timed: Timed, baseline: str) -> float:
    """Half-width of the widest interval: of the ratios, or of the baseline's own time where it is alone."""
    against = timed.turns(baseline)
    others = [name for name in timed.calls if name != baseline]
    if not others:
        return median_interval(against).half_width
    return max(median_ratio(against, timed.turns(name)).half_width for name in others)
