"""The run in a few sentences: what the sparse rows keep of the dense ones' quality, bytes and time.

No word of better or worse without the numbers, and none about significance: a run is one seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sqat.report.collecting import Result, Run

DENSE = "dense"


def baseline_of(results: Sequence[Result]) -> Result | None:
    """The dense float row: the first whose label begins with ``dense``; none where no label does."""
    return next((row for row in results if row.label.startswith(DENSE)), None)


def best_of(run: Run) -> Result | None:
    """The row to judge: of those not dense, and measured on the file that is there, the one with the best metric."""
    rows = [row for row in run.results
            if not row.label.startswith(DENSE) and not row.stale and run.metric in row.metrics]  # fmt: skip
    return max(rows, key=lambda row: row.metrics[run.metric], default=None)


def headline(run: Run) -> str:
    """One sentence."""
    dense, best = baseline_of(run.results), best_of(run)
    if dense is None or best is None or dense.stale or run.metric not in dense.metrics:
        return (f"Nothing to compare: that takes a measured row whose label begins with {DENSE!r} and one whose label "
                "does not.")  # fmt: skip
    one, other = best.metrics[run.metric], dense.metrics[run.metric]
    text = f"{best.label} reaches {run.metric} {figure(one)}, {dense.label} {figure(other)}"
    if math.isfinite(one) and math.isfinite(other) and other > 0:
        text += f": it keeps {100 * one / other:.1f} % of it"
    if best.size_bytes and dense.size_bytes:
        text += f" in {100 * best.size_bytes / dense.size_bytes:.0f} % of the bytes"
    return text + "."


def remarks(run: Run) -> Iterator[str]:
    """Further sentences: against the dense row of the same precision, speed, and what one seed can say."""
    best = best_of(run)
    if best is not None:
        yield from against_dense(run, best)
        yield from how_fast(run, best)
        yield (f"{best.label} is the best on {run.split} of the rows not called {DENSE}, chosen by the figures it is "
               "shown with; this is one run of one seed, and differences between seeds may be as large "
               "(scripts/results compares seeds).")  # fmt: skip


def against_dense(run: Run, best: Result) -> Iterator[str]:
    """What sparsity itself costs: the difference from every other dense row."""
    for row in run.results:
        if row.label.startswith(DENSE) and row is not baseline_of(run.results) and run.metric in row.metrics:
            difference = best.metrics[run.metric] - row.metrics[run.metric]
            if math.isfinite(difference):
                yield f"Against {row.label} ({figure(row.metrics[run.metric])}) that is {difference:+.4f}."


def how_fast(run: Run, best: Result) -> Iterator[str]:
    """The ratios of the row, wherever it was timed."""
    for setting in run.speeds:
        for name, speed in setting.rows.items():
            if name.partition("@")[0] == best.label and speed.ratio is not None:
                ratio = speed.ratio
                yield (f"At {setting.title} {name} is {ratio.median:.2f} times as fast as {setting.baseline} (95 % "
                       f"interval {ratio.low:.2f} to {ratio.high:.2f}).")  # fmt: skip


def figure(value: float) -> str:
    """A metric in four decimals; infinity by its sign."""
    if math.isfinite(value):
        return f"{value:.4f}"
    return "not a number" if math.isnan(value) else "∞" if value > 0 else "-∞"
