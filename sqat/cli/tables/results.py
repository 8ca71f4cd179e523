"""Tables of `sqat run` (results and plan) and `sqat evaluate` (metrics)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sqat.cli.printing import format_time, print_json, relative_path, result_console
from sqat.cli.tables.layout import format_count, format_digits, natural_width, new_table

CARD = "README.md"  # beside an exported file
Times = Mapping[str, tuple[str, float]]

if TYPE_CHECKING:
    from sqat.bench.report import Report
    from sqat.pipeline.bootstrap import Difference
    from sqat.pipeline.plan import PlannedStage
    from sqat.pipeline.results import Results


def print_results(results: Results, latencies: Report | None = None, *, as_json: bool = False) -> None:
    """Print the results table: metrics, difference to the first row, latency, size and path of each artifact."""
    times = fastest_engines(results, latencies)
    if as_json:
        rows = [{**vars(row), "path": str(row.path), "difference": row.difference and vars(row.difference),
                 "latency": times.get(row.label) and {"engine": times[row.label][0], "ms": times[row.label][1]}}
                for row in results.rows]  # fmt: skip
        print_json({"split": results.split, "data_digest": results.data_digest,
                    "directory": str(results.directory), "rows": rows})  # fmt: skip
        return
    console = result_console()
    if not results.rows:
        console.print(f"no results yet in {relative_path(results.directory)}", soft_wrap=True)
        return
    metrics = list(dict.fromkeys(metric for row in results.rows for metric in row.metrics))
    table, num_metrics, has_path = fit_table(results, metrics, times, console)
    console.print(table)
    console.print()
    if not has_path:
        for row in results.rows:
            console.print(f"{row.label}: {relative_path(row.path)}", soft_wrap=True)
    if num_metrics < len(metrics):
        console.print(f"--json also shows: {', '.join(metrics[num_metrics:])}")
    if (difference := find_difference(results)) is not None:
        explanation = f"difference: {difference.metric} minus that of {difference.against}, with its 95 % interval"
        console.print(f"{explanation} (bootstrap over the {results.split} split)", soft_wrap=True)
    if latencies is not None and times:
        console.print(describe_latencies(latencies, times, results.split), soft_wrap=True)
    source = f"{results.split} split, data {results.data_digest[:12]}, run in {relative_path(results.directory)}"
    console.print(source, soft_wrap=True)
    if (card := results.rows[-1].path.with_name(CARD)).is_file():
        console.print(f"how to load the file: {relative_path(card)}", soft_wrap=True)
    console.print(f"the whole run as a page: sqat report {relative_path(results.directory)}", soft_wrap=True)


def fit_table(results: Results, metrics: list[str], times: Times, console: Console) -> tuple[Table, int, bool]:
    """Build the table with as many columns as fit: drop the paths first, then the last metrics."""
    for num_metrics, has_path in [(len(metrics), True), *((count, False) for count in range(len(metrics), 0, -1))]:
        table = results_table(results, metrics[:num_metrics], times, has_path)
        if Measurement.get(console, console.options, table).minimum <= console.width >= natural_width(table):
            return table, num_metrics, has_path
    return results_table(results, metrics[:1], times, False), min(len(metrics), 1), False


def results_table(results: Results, metrics: list[str], times: Times, has_path: bool) -> Table:
    """Build the results table of some metrics."""
    compared = ["difference"] if find_difference(results) else []
    timed = ["ms", "faster"] if times else []
    table = new_table("", *metrics, *compared, *timed, "MB")
    if has_path:
        table.add_column("path")
    digits = {metric: num_decimals([row.metrics.get(metric) for row in results.rows]) for metric in metrics}
    for row in results.rows:
        values = [format_metric(row.metrics.get(metric), digits[metric]) for metric in metrics]
        path = [relative_path(row.path)] if has_path else []
        difference = [format_difference(row.difference)] if compared else []
        latency = format_latency(times, results.rows[0].label, row.label) if times else []
        table.add_row(row.label, *values, *difference, *latency, f"{row.size_bytes / 1e6:.1f}", *path)
    return table


def fastest_engines(results: Results, latencies: Report | None) -> Times:
    """Return label -> the engine in which a result is fastest, and its milliseconds."""
    if latencies is None:
        return {}
    from sqat.bench.results import fastest

    found = {row.label: fastest(latencies, row.label) for row in results.rows}
    return {label: time for label, time in found.items() if time is not None}


def describe_latencies(report: Report, times: Times, split: str) -> str:
    """Say what the milliseconds are of: the batch, the processor and the engine of each result."""
    from sqat.bench.report import size_text

    engines: dict[str, list[str]] = {}
    for label, (engine, _) in times.items():
        engines.setdefault(engine, []).append(label)
    named = "; ".join(f"{engine}: {', '.join(labels)}" for engine, labels in engines.items())
    size = size_text(report.settings[0].batch, report.settings[0].sequence)
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    where = f"{threads} of {report.cpu or 'this processor'}"
    return f"ms: median for the first rows of {split} ({size}), {where}, in the fastest engine here ({named})"


def format_latency(times: Times, first: str, label: str) -> list[str]:
    """Format milliseconds, and how many times as fast as the first row a result is."""
    if label not in times:
        return ["-", "-"]
    ratio = f"{times[first][1] / times[label][1]:.2f}x" if first in times else "-"
    return [format_digits(times[label][1]), ratio]


def find_difference(results: Results) -> Difference | None:
    """Return the first difference of a table, which says what is compared."""
    return next((row.difference for row in results.rows if row.difference is not None), None)


def format_difference(difference: Difference | None) -> str:
    """Format a difference with its interval; empty for the row that the others are compared with."""
    if difference is None:
        return ""
    interval = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.has_interval else ""
    return f"{difference.value:+.4f}{interval}"


def print_metrics(metrics: Mapping[str, float], split: str, artifact: Path, *, as_json: bool = False) -> None:
    """Print the metrics of one artifact."""
    if as_json:
        print_json({"artifact": str(artifact), "split": split, "metrics": metrics})
        return
    table = new_table(split)
    table.add_column(relative_path(artifact), justify="right", overflow="fold")
    for name, value in metrics.items():
        table.add_row(name, format_metric(value, num_decimals([value])))
    result_console().print(table)


def num_decimals(values: Sequence[float | None]) -> int:
    """Return the decimals of a column: none for counts, four for shares, three for values over 1."""
    numbers = [abs(value) for value in values if value is not None]
    if numbers and max(numbers) > 1 and all(value % 1 == 0 for value in numbers):
        return 0
    return 4 if all(value <= 1 for value in numbers) else 3


def format_metric(value: float | None, decimals: int) -> str:
    """Format a metric; ``-`` for None."""
    return "-" if value is None else f"{value:.{decimals}f}"


def print_plan(plan: Sequence[PlannedStage], *, as_json: bool = False) -> None:
    """Print what `sqat run` would do."""
    if as_json:
        print_json([{**vars(stage), "directory": str(stage.directory)} for stage in plan])
        return
    console = result_console()
    console.print(plan_table(plan))
    for stage in plan:
        if stage.teacher is not None:
            console.print(f"teacher of {stage.name}: {stage.teacher}", soft_wrap=True)
        for gate in stage.gates:
            console.print(f"gate of {stage.name}: {gate}", soft_wrap=True)
        if stage.failed_gate:
            console.print(f"{stage.name} misses a gate: {stage.failed_gate}", soft_wrap=True)
    pending = [stage for stage in plan if not stage.unchanged]
    if not pending:
        console.print("nothing to do: every stage is unchanged")
        return
    seconds = [stage.seconds for stage in pending if stage.seconds is not None]
    num_unknown = len(pending) - len(seconds)
    time = format_time(sum(seconds)) if seconds else "unknown"
    time += f", and {num_unknown} of unknown time" if num_unknown and seconds else ""
    console.print(f"{len(pending)} of {len(plan)} stages will run, time {time}")


def plan_table(plan: Sequence[PlannedStage]) -> Table:
    """Build the table of the plan: a row per stage."""
    table = new_table("#")
    for title in ("stage", "from"):
        table.add_column(title, overflow="fold")
    for title in ("key", "steps", "samples", "time", ""):
        table.add_column(title, justify="left" if title in ("key", "") else "right", no_wrap=True)
    for stage in plan:
        name = stage.name if stage.name == stage.type else f"{stage.name} ({stage.type})"
        amounts = (format_count(stage.steps), format_count(stage.samples), format_time(stage.seconds))
        state = "unchanged" if stage.unchanged else "will run"
        table.add_row(str(stage.number), name, stage.parent or "-", stage.fingerprint[:7], *amounts, state)
    return table
