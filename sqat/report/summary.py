"""The run in a few sentences: what the sparse rows keep of the dense rows' quality, size and speed.

A sentence never says better or worse without numbers. Intervals are over the rows of one run; seeds differ too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sqat.pipeline.bootstrap import Difference, compare
from sqat.report.read_run import Result, Run

DENSE = "dense"


def dense_baseline(results: Sequence[Result]) -> Result | None:
    """Return the first row whose label begins with ``dense``."""
    return next((row for row in results if row.label.startswith(DENSE)), None)


def best_result(run: Run) -> Result | None:
    """Return the row with the best metric that is not dense and was measured on its present file."""
    rows = [row for row in run.results
            if not row.label.startswith(DENSE) and not row.stale and run.metric in row.metrics]  # fmt: skip
    return max(rows, key=lambda row: row.metrics[run.metric], default=None)


def difference_to_dense(run: Run, row: Result) -> Difference | None:
    """Return the difference of a row to the dense baseline in the run's metric; None where it cannot be taken."""
    dense, metric = dense_baseline(run.results), run.metric
    if dense is None or dense is row or metric not in dense.samples or metric not in row.samples:
        return None
    return compare(metric, dense.label, (row.metrics[metric], dense.metrics[metric]), (row.samples, dense.samples))


def headline(run: Run) -> str:
    """Compare the best row with the dense baseline in one sentence."""
    dense, best = dense_baseline(run.results), best_result(run)
    if dense is None or best is None or dense.stale or run.metric not in dense.metrics:
        return f"Nothing to compare: no measured row whose label begins with {DENSE!r}, or no other measured row."
    metric, dense_metric = best.metrics[run.metric], dense.metrics[run.metric]
    text = f"{best.label} reaches {run.metric} {format_metric(metric)}, {dense.label} {format_metric(dense_metric)}"
    if math.isfinite(metric) and math.isfinite(dense_metric) and dense_metric > 0:
        text += f": it keeps {100 * metric / dense_metric:.1f} % of it"
    if (difference := difference_to_dense(run, best)) is not None:
        text += f" (difference {format_difference(difference)})"
    if best.size_bytes and dense.size_bytes:
        text += f" in {100 * best.size_bytes / dense.size_bytes:.0f} % of the bytes"
    return text + "."


def remarks(run: Run) -> Iterator[str]:
    """Yield further sentences: other dense rows, speed, and what one seed cannot show."""
    best = best_result(run)
    if best is None:
        return
    for row in run.results:
        if row.label.startswith(DENSE) and row is not dense_baseline(run.results) and run.metric in row.metrics:
            difference = best.metrics[run.metric] - row.metrics[run.metric]
            if math.isfinite(difference):
                yield f"Against {row.label} ({format_metric(row.metrics[run.metric])}) that is {difference:+.4f}."
    for setting in run.latencies:
        for name, latency in setting.rows.items():
            if name.partition("@")[0] == best.label and latency.speedup is not None:
                ratio = latency.speedup
                yield (f"At {setting.title} {name} is {ratio.median:.2f} times as fast as {setting.baseline} (95 % "
                       f"interval {ratio.low:.2f} to {ratio.high:.2f}).")  # fmt: skip
    yield (f"{best.label} is the row with the best {run.metric} on {run.split} that is not {DENSE}. This is one run of "
           "one seed; seeds may differ as much (scripts/results/make compares them).")  # fmt: skip


def format_difference(difference: Difference) -> str:
    """Format a difference with its 95 % interval."""
    interval = f", 95 % interval {difference.low:+.4f} to {difference.high:+.4f}" if difference.has_interval else ""
    return f"{difference.value:+.4f}{interval}"


def format_metric(value: float) -> str:
    """Format a metric with four decimals; infinity by its sign."""
    if math.isfinite(value):
        return f"{value:.4f}"
    return "not a number" if math.isnan(value) else "∞" if value > 0 else "-∞"
