"""The plot of an analysis: a bar a treatment for every layer, the most sensitive layer on top."""

from __future__ import annotations

from pathlib import Path

from sqat.analyze.findings import Findings, LayerFinding
from sqat.plots.figure import blank_figure, save_figure

COLOURS = {"pruned": "#3b6ea5", "int8": "#8a8f98", "both": "#b5541c"}
LINE, BAR = 0.42, 0.27  # inches a layer; share of it that a bar takes


def save_plot(findings: Findings, path: Path) -> None:
    """Draw the findings to a file of any kind matplotlib writes (PNG, SVG, PDF).

    Raises:
        SqatError: matplotlib is not installed, or does not know the kind.
    """
    layers = findings.layers[::-1]  # matplotlib draws the first at the bottom
    figure = blank_figure(9, 1.2 + LINE * len(layers))
    panel = figure.subplots()
    for place, (kind, colour) in enumerate(COLOURS.items()):
        heights = [number + (1 - place) * BAR for number in range(len(layers))]
        panel.barh(heights, [bar_of(layer, kind) for layer in layers], height=BAR, color=colour, label=kind)
    panel.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    panel.set_ylim(-0.6, len(layers) - 0.4)
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_xlabel(f"damage of one layer alone: {findings.damage}, {findings.rows} rows of {findings.split}")
    panel.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def bar_of(layer: LayerFinding, kind: str) -> float:
    """The length of a bar; 0 for a treatment the layer does not get."""
    value = {"pruned": layer.damage.pruned, "int8": layer.damage.int8, "both": layer.damage.both}[kind]
    return 0.0 if value is None else value
