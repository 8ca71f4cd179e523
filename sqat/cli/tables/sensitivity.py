"""Table of `sqat analyze`: the sensitivity of each layer, of all layers together, and what fits a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sqat.cli.printing import relative_path, result_console
from sqat.cli.tables.layout import common_prefix, format_percent, new_table, print_paragraph, shorten

if TYPE_CHECKING:
    from sqat.analyze.findings import BudgetChoice, Findings, Sensitivity, Shares


def print_sensitivity(findings: Findings) -> None:
    """Print a row per layer, the sum, all layers together, and the choice within the budget."""
    console = result_console()
    stages = [f"{name} ({kind})" for kind, name in (("prune", findings.prune), ("int8", findings.calibrate)) if name]
    print_paragraph(console, "model", relative_path(Path(findings.checkpoint)))
    print_paragraph(console, "as in", ", ".join(stages))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in findings.plain.items())
    print_paragraph(console, "plain", f"{figures} ({findings.rows} rows of {findings.split})")
    print_paragraph(console, "sensitivity", describe_measure(findings.measure))
    console.print()
    prefix = common_prefix([layer.name for layer in findings.layers])
    table = new_table("layer alone", "N:M", "weights", "pruned", "int8", "both")
    for layer in findings.layers:
        cells = (layer.pattern or "-", format_percent(layer.weights), *sensitivity_cells(layer.sensitivity))
        table.add_row(shorten(layer.name, prefix), *cells)
    table.add_section()
    table.add_row("sum of the layers", "", "", *sensitivity_cells(findings.summed))
    table.add_row("all layers together", "", "", *sensitivity_cells(findings.together))
    console.print(table)
    if prefix:
        console.print(f"~ is {prefix}")
    console.print()
    print_paragraph(console, "treated", treated_text(findings.sparse, findings.int8))
    if findings.choice is not None:
        print_choice(console, findings.choice)
    console.print()
    for note in findings.notes:
        print_paragraph(console, "note", note)


def print_choice(console: Console, choice: BudgetChoice) -> None:
    """Print which layers to skip, and the sections of the recipe that say so."""
    predicted, measured = format_value(choice.predicted), format_value(choice.measured)
    skipped = f"{len(choice.dense)} layers stay dense, {len(choice.float_layers)} float"
    print_paragraph(console, "budget", f"{choice.budget:g}: {skipped}; sensitivity {measured}, predicted {predicted}")
    print_paragraph(console, "kept", treated_text(choice.sparse, choice.int8))
    for stage, section in choice.recipe.items():
        console.print(f"# stages.{stage}" + ("" if section else ": no layer remains, remove the stage"))
        if section:
            console.print(section, soft_wrap=True)


def treated_text(sparse: Shares, int8: Shares) -> str:
    """Return which shares are sparse and int8."""
    weights = f"{format_percent(sparse.weights)} sparse, {format_percent(int8.weights)} int8"
    work = f"{format_percent(sparse.multiply_adds)} sparse, {format_percent(int8.multiply_adds)} int8"
    return f"of the weights {weights}; of the multiply-adds {work}"


def describe_measure(measure: str) -> str:
    """Return what the numbers of an analysis mean."""
    if measure != "output loss":
        return f"{measure} of the plain model minus that of the treated one"
    return "output loss between treated and plain model: KL, squared difference or 1 - cosine, by task"


def sensitivity_cells(sensitivity: Sensitivity) -> tuple[str, str, str]:
    """Return the cells of the three treatments."""
    return format_value(sensitivity.pruned), format_value(sensitivity.int8), format_value(sensitivity.both)


def format_value(value: float | None) -> str:
    """Format a value with three digits; ``-`` for a treatment that was not tried."""
    return "-" if value is None else f"{value:.3g}"
