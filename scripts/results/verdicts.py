"""Whether an application reached its goals: differences of two rows, seed by seed.

A goal is met if the mean difference is at or above zero. A miss is named so where the 95 % interval (without one, the
spread over seeds) reaches the goal. The floor (at most half a point below the dense fp32 model) is judged by the worst
column that is a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from scripts.results.applications import DENSE, FLOOR, RATIOS, Display, title
from scripts.results.schema import Application
from scripts.results.spread import differences, mean_and_spread


@dataclass(frozen=True)
class Verdict:
    """One goal of an application.

    Attributes:
        values: the differences, one a seed; empty where a row or metric is missing.
        least: what their mean must reach.
        interval: of their mean, over seeds and rows; None where the runs kept no samples.
    """

    row: str
    against: str
    metric: str
    values: tuple[float, ...]
    least: float
    goal: str
    interval: tuple[float, float] | None = None

    @property
    def outcome(self) -> str:
        """Met or not."""
        if not self.values:
            return "not measured"
        mean, spread = mean_and_spread(self.values)
        if mean >= self.least:
            return "met"
        if self.interval is not None:
            return "not met, though within the interval" if self.interval[1] >= self.least else "not met"
        return "not met, though within the spread" if spread is not None and mean + spread >= self.least else "not met"


def verdicts(display: Display, application: Application) -> list[Verdict]:
    """All goals of an application, the floor last."""
    if not display.goals:
        return []
    row, found = judged_row(display, application), []
    for goal in display.goals:
        values = tuple(differences(application.seeds, row, goal.against, goal.metric))
        text = f"{title(goal.metric)} at or above {goal.against}"
        interval = find_interval(application, row, goal.against, goal.metric)
        found.append(Verdict(row, goal.against, goal.metric, values, 0.0, text, interval))
    return [*found, floor(display, row, application)]


def judged_row(display: Display, application: Application) -> str:
    """The last of the rows that some seed has."""
    present = [row for row in display.rows if any(row in seed.rows for seed in application.seeds.values())]
    return present[-1] if present else display.rows[-1]


def gains(display: Display, application: Application) -> list[Verdict]:
    """What each sparse row brings over the one before it, by the first column; no goal, so no outcome."""
    sparse = [row for row in display.rows if row.startswith("sparse ")]
    return [
        Verdict(
            row,
            before,
            display.metrics[0],
            values,
            0.0,
            "",
            find_interval(application, row, before, display.metrics[0]),
        )
        for before, row in pairwise(sparse)
        if (values := tuple(differences(application.seeds, row, before, display.metrics[0])))
    ]


def floor(display: Display, row: str, application: Application) -> Verdict:
    """The worst column that is a share against the dense fp32 model."""
    shares = [metric for metric in display.metrics if metric not in RATIOS]
    every = {metric: tuple(differences(application.seeds, row, DENSE, metric)) for metric in shares}
    measured = {metric: values for metric, values in every.items() if values}
    worst = min(measured, key=lambda metric: mean_and_spread(measured[metric])[0], default="")
    text = f"no share more than {100 * FLOOR:g} points below {DENSE}"
    text += f" (the worst: {title(worst)})" if worst else ""
    interval = find_interval(application, row, DENSE, worst)
    return Verdict(row, DENSE, worst, measured.get(worst, ()), -FLOOR, text, interval)


def find_interval(application: Application, row: str, against: str, metric: str) -> tuple[float, float] | None:
    """The interval of the difference of two rows; None where it was not computed."""
    found = ((each.low, each.high) for each in application.intervals
             if (each.row, each.against, each.metric) == (row, against, metric))  # fmt: skip
    return next(found, None)


def show_difference(verdict: Verdict) -> str:
    """``+0.32 [-0.10, +0.74] points``, or ± the spread; a plain number where the metric is no share."""
    mean, spread = mean_and_spread(verdict.values)
    scale, unit = (1, "") if verdict.metric in RATIOS else (100, " points")
    if verdict.interval is not None:
        low, high = (scale * end for end in verdict.interval)
        return f"{scale * mean:+.2f} [{low:+.2f}, {high:+.2f}]{unit}"
    return f"{scale * mean:+.2f}" + ("" if spread is None else f" ± {scale * spread:.2f}") + unit
