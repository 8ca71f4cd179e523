"""The tables on standard output: results, plan, metrics and layers, each also as JSON.

Made to be read at 80 columns: what does not fit goes below the table, or is named there and left to JSON.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sqat.cli.console import nearby, print_json, result_console, show_time
from sqat.lint.report_row import LayerReport

if TYPE_CHECKING:
    from sqat.lint.inspection import Lint
    from sqat.lint.repaired_file import Repair
    from sqat.pipeline.plan import PlannedStage
    from sqat.pipeline.results import Results
    from sqat.tensorrt.report import EngineReport

SMALLEST_SHOWN = 1e-9  # the scale of a channel that holds nothing but zeros is smaller still


def print_results(results: Results, *, as_json: bool = False) -> None:
    """The closing table: a row per artifact with its metrics, size and path."""
    if as_json:
        print_json(
            {
                "split": results.split,
                "data_digest": results.data_digest,
                "directory": str(results.directory),
                "rows": [
                    {"label": row.label, "stage": row.stage, "metrics": row.metrics,
                     "size_bytes": row.size_bytes, "path": str(row.path)}
                    for row in results.rows
                ],
            }
        )  # fmt: skip
        return
    console = result_console()
    if not results.rows:
        console.print(f"no results yet in {nearby(results.directory)}", soft_wrap=True)
        return
    metrics = list(dict.fromkeys(metric for row in results.rows for metric in row.metrics))
    table, shown, has_path = _fitting_results(results, metrics, console)
    console.print(table)
    console.print()
    if not has_path:
        for row in results.rows:
            console.print(f"{row.label}: {nearby(row.path)}", soft_wrap=True)
    if shown < len(metrics):
        console.print(f"also measured, see --json: {', '.join(metrics[shown:])}")
    console.print(
        f"{results.split} split, data {results.data_digest[:12]}, run in {nearby(results.directory)}", soft_wrap=True
    )


def _fitting_results(results: Results, metrics: list[str], console: Console) -> tuple[Table, int, bool]:
    """The fullest table that fits the console: first the paths go, then the last metrics."""
    for shown, has_path in [(len(metrics), True), *((count, False) for count in range(len(metrics), 0, -1))]:
        table = _results_table(results, metrics[:shown], has_path)
        if Measurement.get(console, console.options, table).minimum <= console.width >= natural_width(table):
            return table, shown, has_path
    return _results_table(results, metrics[:1], False), min(len(metrics), 1), False


def _results_table(results: Results, metrics: list[str], has_path: bool) -> Table:
    table = new_table("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    table.add_column("MB", justify="right")
    if has_path:
        table.add_column("path")
    digits = {metric: _digits([row.metrics.get(metric) for row in results.rows]) for metric in metrics}
    for row in results.rows:
        figures = [show_number(row.metrics.get(metric), digits[metric]) for metric in metrics]
        path = [nearby(row.path)] if has_path else []
        table.add_row(row.label, *figures, f"{row.size_bytes / 1e6:.1f}", *path)
    return table


def print_metrics(metrics: Mapping[str, float], split: str, artifact: Path, *, as_json: bool = False) -> None:
    """What `sqat evaluate` measured."""
    if as_json:
        print_json({"artifact": str(artifact), "split": split, "metrics": metrics})
        return
    table = new_table(split)
    table.add_column(nearby(artifact), justify="right", overflow="fold")
    for name, value in metrics.items():
        table.add_row(name, show_number(value, _digits([value])))
    result_console().print(table)


def print_plan(plan: Sequence[PlannedStage], *, as_json: bool = False) -> None:
    """What `sqat run` would do."""
    if as_json:
        print_json([{**vars(stage), "directory": str(stage.directory)} for stage in plan])
        return
    table = new_table("#")
    for title in ("stage", "from"):
        table.add_column(title, overflow="fold")
    for title in ("key", "steps", "samples", "time", ""):
        table.add_column(title, justify="right" if title not in ("key", "") else "left", no_wrap=True)
    for stage in plan:
        name = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
        amounts = (show_count(stage.steps), show_count(stage.samples), show_time(stage.seconds))
        state = "unchanged" if stage.unchanged else "will run"
        table.add_row(str(stage.number), name, stage.parent or "-", stage.key[:7], *amounts, state)
    console = result_console()
    console.print(table)
    for stage in plan:
        for gate in stage.gates:
            console.print(f"gate of {stage.name}: {gate}", soft_wrap=True)
        if stage.missed:
            console.print(f"{stage.name} misses a gate: {stage.missed}", soft_wrap=True)
    waiting = [stage for stage in plan if not stage.unchanged]
    known = [stage.seconds for stage in waiting if stage.seconds is not None]
    unknown = len(waiting) - len(known)
    total = (
        f"{show_time(sum(known))}{f', and {unknown} of unknown time' if unknown and known else ''}"
        if known
        else "unknown"
    )
    console.print(
        f"{len(waiting)} of {len(plan)} stages will run, time {total}"
        if waiting
        else "nothing to do: every stage is unchanged"
    )


def print_layers(layers: Sequence[LayerReport], path: Path, *, as_json: bool = False) -> None:
    """What `sqat inspect` found, a row per layer; a letter marks those that something is said about below.

    Of a checkpoint that is why a layer was left alone, of a graph why an engine would not run it sparse in int8.
    """
    layers = sorted(layers, key=lambda layer: natural(layer.name))
    if as_json:
        print_json({"path": str(path), "layers": [_layer_values(layer) for layer in layers]})
        return
    console = result_console()
    judged = any(layer.runs for layer in layers)
    prefix = common_prefix([layer.name for layer in layers])
    table = new_table("layer")
    for title in ("shape", "N:M", "zero%", "scale", "amax", *(() if judged else ("SQNR", "sat.%"))):
        table.add_column(title, justify="right", no_wrap=True)
    if judged:
        table.add_column("runs as", no_wrap=True)
    reasons = Counter(_reason(layer) for layer in layers if _reason(layer))
    marks = dict(zip(reasons, "abcdefghijklmnopqrstuvwxyz", strict=False))
    for layer in layers:
        table.add_row(shorten(layer.name, prefix), *_layer_cells(layer, marks.get(_reason(layer), "")))
    console.print(table)
    console.print()
    for reason, count in reasons.items():
        left = "" if judged else "left alone, "
        console.print(f"{marks.get(reason, '-')}: {left}{reason} ({count} of {len(layers)} layers)")
    if prefix:
        console.print(f"~ is {prefix}")
    last = "runs as: by TensorRT's rules, ? in doubt" if judged else "SQNR in dB; sat.%: above amax"
    console.print(f"scale: {'of' if judged else 'smallest-largest of'} the weight, x 1e-3; {last}")


def _layer_values(layer: LayerReport) -> dict[str, object]:
    """A layer for JSON; a checkpoint's is not judged."""
    return {name: value for name, value in vars(layer).items() if layer.runs or name not in ("runs", "why")}


def _reason(layer: LayerReport) -> str:
    return layer.why if layer.runs else layer.reason


def _layer_cells(layer: LayerReport, mark: str) -> list[str]:
    scale = layer.weight_scale
    cells = [
        "x".join(str(size) for size in layer.shape),
        layer.pattern if layer.runs else f"{layer.pattern} {mark}".strip(),
        f"{100 * layer.zeros:.1f}",
        "-" if scale is None else "-".join(f"{1e3 * end:.2g}" if end > SMALLEST_SHOWN else "0" for end in scale),
        "-" if layer.input_amax is None else f"{layer.input_amax:.3g}",
    ]
    if layer.runs:
        return [*cells, f"{layer.runs} {mark}".strip()]
    return [
        *cells,
        "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        "-" if layer.saturated is None else show_share(layer.saturated),
    ]


def print_findings(lint: Lint, path: Path, *, repair: Repair | None = None, as_json: bool = False) -> None:
    """What the linter says of a file for a target, and what was repaired before, if that was asked for."""
    from sqat.lint.text import lint_lines, lint_values

    if as_json:
        print_json(lint_values(lint, path, repair))
        return
    console = result_console()
    for line in lint_lines(lint, repair, console.width):
        console.print(line, soft_wrap=True)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def common_prefix(names: Sequence[str]) -> str:
    """The part up to the layer number that most names share, e.g. ``bert.encoder.layer.``."""
    prefixes = Counter(name[: found.start() + 1] for name in names if (found := re.search(r"\.\d+\.", name)))
    return prefixes.most_common(1)[0][0] if prefixes else ""


def shorten(name: str, prefix: str) -> str:
    """A layer's name with ``~`` for the prefix."""
    return f"~{name.removeprefix(prefix)}" if prefix and name.startswith(prefix) else name


def new_table(first: str) -> Table:
    """An empty table with one column."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    return table


def natural_width(table: Table) -> int:
    """Characters a table takes when nothing in it is wrapped."""
    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).maximum


def _digits(values: Sequence[float | None]) -> int:
    """Decimals of a column: none for counts, four for shares, three beyond 1."""
    known = [abs(value) for value in values if value is not None]
    if known and max(known) > 1 and all(value % 1 == 0 for value in known):
        return 0
    return 4 if all(value <= 1 for value in known) else 3


def show_number(value: float | None, digits: int) -> str:
    """A figure of a table; ``-`` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def show_count(count: int | None) -> str:
    """A whole number, rounded to three figures from 100,000 on; ``-`` where unknown."""
    if count is None:
        return "-"
    return f"{count:,}" if count < 100_000 else f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.3g}M"


def show_share(share: float) -> str:
    """A share in percent that fits five characters."""
    return "0" if share == 0 else "<0.01" if share < 1e-4 else f"{100 * share:.2f}"


def print_engine(report: EngineReport, *, as_json: bool = False) -> None:
    """What `sqat engine` found, a row per layer; a letter marks those that do not run sparse for the reason below."""
    if as_json:
        print_json(report.as_json())
        return
    console = result_console()
    rows = sorted(report.rows, key=lambda row: natural(row.name))
    prefix = common_prefix([row.name for row in rows])
    table = new_table("layer")
    for title in ("shape", "N:M", "weight", "eligible", "sparse kernel"):
        table.add_column(title, justify="right" if title == "shape" else "left", no_wrap=True)
    reasons = Counter(row.reason for row in rows if row.reason)
    marks = dict(zip(reasons, "abcdefghijklmnopqrstuvwxyz", strict=False))
    for row in rows:
        chosen = {True: "yes", False: "no", None: "on the GPU" if row.eligible and report.chosen_later else "-"}
        cells = ("x".join(str(size) for size in row.shape), row.pattern, row.weight_type or "-")
        last = f"{chosen[row.chosen]} {marks.get(row.reason, '')}".strip()
        table.add_row(shorten(row.name, prefix), *cells, "yes" if row.eligible else "no", last)
    console.print(table)
    console.print()
    for reason, count in reasons.items():
        console.print(f"{marks.get(reason, '-')}: {reason} ({count} of {len(rows)} layers)")
    if prefix:
        console.print(f"~ is {prefix}")
    if report.untraced:
        console.print(f"not found in the file: {len(report.untraced)} sparse engine layers, {report.untraced[0]} first")
    for line in (*report.notes, report.weights(), report.summary()):
        if line:
            console.print(line)
    if report.engine is not None:
        console.print(f"{nearby(report.engine)}, built in {show_time(report.seconds)}", soft_wrap=True)
