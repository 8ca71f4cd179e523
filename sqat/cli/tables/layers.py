"""Tables with a row per layer: `sqat inspect` (layers and lint findings) and `sqat engine`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sqat.cli.printing import format_time, print_json, relative_path, result_console
from sqat.cli.tables.layout import Footnotes, common_prefix, format_shape, natural_order, new_table, shorten
from sqat.lint.layer_row import LayerRow

if TYPE_CHECKING:
    from sqat.lint.layer_report import LintReport
    from sqat.lint.repair_file import RepairResult
    from sqat.tensorrt.report import EngineReport

SMALLEST_SCALE = 1e-9  # the scale of a channel of zeros is smaller


def print_layers(layers: Sequence[LayerRow], path: Path, *, as_json: bool = False) -> None:
    """Print a row per layer; a letter marks the layers that the lines below explain.

    For a checkpoint the lines say why a layer was skipped, for a graph why an engine would not run it sparse in int8.
    """
    layers = sorted(layers, key=lambda layer: natural_order(layer.name))
    if as_json:
        print_json({"path": str(path), "layers": [layer_values(layer) for layer in layers]})
        return
    console = result_console()
    is_graph = any(layer.runs for layer in layers)
    prefix = common_prefix([layer.name for layer in layers])
    table = new_table("layer", "shape", "N:M", "zero%", "scale", "amax", *(() if is_graph else ("SQNR", "sat.%")))
    if is_graph:
        table.add_column("runs as", no_wrap=True)
    if has_methods := any(layer.method for layer in layers):
        table.add_column("amax by", no_wrap=True)
    footnotes = Footnotes(layer.reason for layer in layers)
    for layer in layers:
        method = [layer.method or "-"] if has_methods else []
        table.add_row(shorten(layer.name, prefix), *layer_cells(layer, footnotes), *method)
    console.print(table)
    footnotes.print(console, len(layers), "" if is_graph else "skipped: ")
    if prefix:
        console.print(f"~ is {prefix}")
    last = "runs as: by TensorRT's rules, ? if unsure" if is_graph else "SQNR in dB; sat.%: share above amax"
    console.print(f"scale: {'' if is_graph else 'min-max '}of the weight, x 1e-3; {last}")


def layer_values(layer: LayerRow) -> dict[str, object]:
    """Return a layer for JSON; how it runs is known for graphs only, a method where calibration had a choice."""
    return {name: value for name, value in vars(layer).items() if value or name not in ("runs", "method")}


def layer_cells(layer: LayerRow, footnotes: Footnotes) -> list[str]:
    """Return the cells of a row after the name."""
    scale = layer.weight_scale
    cells = [
        format_shape(layer.shape),
        layer.pattern if layer.runs else footnotes.mark(layer.pattern, layer.reason),
        f"{100 * layer.zeros:.1f}",
        "-" if scale is None else "-".join(f"{1e3 * end:.2g}" if end > SMALLEST_SCALE else "0" for end in scale),
        "-" if layer.input_amax is None else f"{layer.input_amax:.3g}",
    ]
    if layer.runs:
        return [*cells, footnotes.mark(layer.runs, layer.reason)]
    sqnr = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
    return [*cells, sqnr, "-" if layer.saturated is None else format_saturation(layer.saturated)]


def format_saturation(share: float) -> str:
    """Format a share in percent in at most six characters."""
    return "0" if share == 0 else "<0.01" if share < 1e-4 else f"{100 * share:.2f}"


def print_findings(lint: LintReport, path: Path, *, repair: RepairResult | None = None, as_json: bool = False) -> None:
    """Print the linter's findings, and what was repaired before."""
    from sqat.lint.show import report_lines, report_values

    if as_json:
        print_json(report_values(lint, path, repair))
        return
    console = result_console()
    for line in report_lines(lint, repair, console.width):
        console.print(line, soft_wrap=True)


def print_engine(report: EngineReport, *, as_json: bool = False) -> None:
    """Print a row per layer of an engine; a letter marks the layers that do not run sparse."""
    if as_json:
        print_json(report.as_json())
        return
    console = result_console()
    rows = sorted(report.rows, key=lambda row: natural_order(row.name))
    prefix = common_prefix([row.name for row in rows])
    table = new_table("layer", "shape")
    for title in ("N:M", "weight", "eligible", "sparse kernel"):
        table.add_column(title, no_wrap=True)
    footnotes = Footnotes(row.reason for row in rows)
    for row in rows:
        unknown = "on the GPU" if row.eligible and report.chosen_later else "-"
        kernel = unknown if row.chosen is None else "yes" if row.chosen else "no"
        cells = (format_shape(row.shape), row.pattern, row.weight_type or "-", "yes" if row.eligible else "no")
        table.add_row(shorten(row.name, prefix), *cells, footnotes.mark(kernel, row.reason))
    console.print(table)
    footnotes.print(console, len(rows))
    if prefix:
        console.print(f"~ is {prefix}")
    if report.untraced:
        console.print(f"not found in the file: {len(report.untraced)} sparse engine layers, e.g. {report.untraced[0]}")
    for line in (*report.notes, report.weights(), report.summary()):
        if line:
            console.print(line)
    if report.engine is not None:
        console.print(f"{relative_path(report.engine)}, built in {format_time(report.seconds)}", soft_wrap=True)
