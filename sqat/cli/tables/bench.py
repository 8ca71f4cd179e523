"""Tables of `sqat bench`: the candidates, then a table per input size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from sqat.cli.printing import result_console
from sqat.cli.tables.layout import format_digits, new_table, print_paragraph

if TYPE_CHECKING:
    from sqat.bench.parity import Parity
    from sqat.bench.report import Report, Setting, Timing


def print_bench(report: Report) -> None:
    """Print the report of a measurement."""
    console = result_console()
    threads = f"{report.threads} of {report.cores} cores, one thread each"
    load = " to ".join(f"{value:.1f}" for value in report.load)
    print_paragraph(console, "cpu", f"{report.cpu or 'unknown'}, {threads}" + (f"; load {load}" if load else ""))
    print_paragraph(console, "with", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    print_paragraph(console, "baseline", report.baseline)
    console.print()
    table = new_table("candidate", "file MB", "memory MB")
    for name, subject in report.subjects.items():
        memory = "-" if subject.memory_bytes is None else format_digits(subject.memory_bytes / 1e6)
        table.add_row(name, format_digits(subject.file_bytes / 1e6), memory)
    console.print(table)
    for setting in report.settings:
        console.print()
        print_setting(console, report, setting)
    console.print()
    for line in bench_notes(report):
        console.print(line, soft_wrap=False)


def print_setting(console: Console, report: Report, setting: Setting) -> None:
    """Print one input size: a row per candidate."""
    from sqat.bench.report import size_text

    size = size_text(setting.batch, setting.sequence)
    table = new_table(size, "p50 ms", "+-%", "p95 ms", "rows/s", "speed-up", "difference")
    for name, timing in setting.rows.items():
        p50 = timing.p50_ms
        cells = (format_digits(p50.median), f"{100 * p50.half_width:.1f}", format_digits(timing.p95_ms))
        rows = format_digits(timing.rows_per_second)
        table.add_row(name, *cells, rows, format_speedup(timing), format_difference(timing.parity))
    console.print(table)
    goal = f"{100 * report.within:g} %"
    end = f"all ratios within {goal}" if setting.reached else f"time limit, not all ratios within {goal}"
    console.print(f"{setting.rounds} rounds; {end}")


def format_speedup(timing: Timing) -> str:
    """Format a ratio and its interval as ``1.37 (1.35-1.39)``."""
    ratio = timing.speedup
    if ratio is None:
        return "baseline"
    form = ".2f" if ratio.median >= 0.1 else ".1g"
    return f"{ratio.median:{form}} ({ratio.low:{form}}-{ratio.high:{form}})"


def format_difference(parity: Parity | None) -> str:
    """Format the largest difference of outputs, with a mark where decisions differ."""
    if parity is None:
        return "-"
    return "?" if parity.problem else f"{parity.largest:.1e}{' !' if parity.differing else ''}"


def bench_notes(report: Report) -> Iterator[str]:
    """Yield what the columns mean, and remarks on single values."""
    yield "p50 and speed-up: medians, with 95 % bootstrap intervals over the rounds."
    yield "difference: largest output difference from the baseline on random inputs."
    yield "Decisions on random inputs are close calls; sqat evaluate uses real inputs."
    yield "memory: growth of a separate process at the largest size."
    for setting in report.settings:
        size = f"{setting.batch}x{setting.sequence}" if setting.sequence else str(setting.batch)
        for name, timing in setting.rows.items():
            if timing.parity is not None and timing.parity.differing:
                yield f"! {size} {name}: {timing.parity.differing} of {timing.parity.rows} decisions differ"
            if timing.parity is not None and timing.parity.problem:
                yield f"? {size} {name}: not compared, {timing.parity.problem}"
    if any(subject.backend == "torch" for subject in report.subjects.values()):
        yield "torch computes int8 layers in float: a reference for outputs, not for speed."
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"skipped: {', '.join(names)}: {reason}"
    for name, reason in report.no_memory.items():
        yield f"memory of {name} is unknown: {reason}"
    if report.load and max(report.load) > report.cores:
        yield f"load {max(report.load):.1f} on {report.cores} cores: other work slows the calls; ratios change less."
