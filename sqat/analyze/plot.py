"""Draw the findings of an analysis: a bar for each treatment of each layer, the most sensitive layer on top."""

from __future__ import annotations

from pathlib import Path

from sqat.analyze.findings import Findings
from sqat.plots.figure import blank_figure, save_figure

COLOURS = {"pruned": "#3b6ea5", "int8": "#8a8f98", "both": "#b5541c"}
INCHES_PER_LAYER, BAR = 0.42, 0.27  # a bar takes this share of its layer


def save_plot(findings: Findings, path: Path) -> None:
    """Draw the findings to a file of any format that matplotlib writes (PNG, SVG, PDF).

    Raises:
        SqatError: matplotlib is not installed, or does not write the format.
    """
    layers = findings.layers[::-1]  # matplotlib draws the first at the bottom
    figure = blank_figure(9, 1.2 + INCHES_PER_LAYER * len(layers))
    panel = figure.subplots()
    for place, (kind, colour) in enumerate(COLOURS.items()):
        heights = [number + (1 - place) * BAR for number in range(len(layers))]
        lengths = [layer.sensitivity.model_dump()[kind] or 0.0 for layer in layers]
        panel.barh(heights, lengths, height=BAR, color=colour, label=kind)
    panel.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    panel.set_ylim(-0.6, len(layers) - 0.4)
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_xlabel(f"sensitivity to one layer alone: {findings.measure}, {findings.rows} rows of {findings.split}")
    panel.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)
