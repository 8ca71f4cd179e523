"""The report's figures as inline SVG that takes font and text colour from the page, light or dark.

matplotlib draws text and axes in one marker colour, which ``currentColor`` replaces. Metadata and namespaces, which
refer to other places, are removed.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqat.lint.layer_row import LayerRow
from sqat.report.grid import Grid
from sqat.report.latencies import LatencySetting
from sqat.report.read_run import Activation, Run, Stage

INK = "#010203"
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733", "#66a5bb", "#aa3377")
SPARSITY = "#999999"
WIDTH = 4.5  # inches, the width of a telephone: 7 points stay 7 pixels
MAX_NUMBERED_CELLS = 100
NUM_BINS, MAX_RATIO = 96, 4.0  # of the strips of activations; the ratio is |x| / amax
Floats = NDArray[np.float64]


def svg(height: float, draw: Callable[[Any], None], title: str) -> str:
    """Return the SVG element of a figure that ``draw`` fills.

    Args:
        height: inches.
        title: for screen readers.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(coloured, INK)  # matplotlib's stubs list every key, other versions have others
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "sqat", "text.parse_math": False, "font.size": 9}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False}
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    _, tag, text = buffer.getvalue().partition("<svg")
    text = re.sub(r"<metadata>.*?</metadata>", "", tag + text, flags=re.DOTALL)
    attributes, end, content = text.partition(">")
    text = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", attributes) + end + content
    text = text.replace(INK, "currentColor").replace("xlink:href", "href")
    prefix = f"{zlib.crc32((title + text).encode()):x}"  # an id must be unique on the page
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def draw_curves(stage: Stage) -> str:
    """Draw the losses of a stage, its dev metrics and its sparsity over the steps."""
    curves = stage.curves
    assert curves is not None

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for (name, points), colour in zip(curves.losses.items(), cycle(COLOURS), strict=False):
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, ".-", color=colour, label=f"{name} loss", linewidth=1.2, markersize=4)
        losses = [value for points in curves.losses.values() for _, value in points]
        if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        add_shares(panel, stage)
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)

    return svg(2.5, draw, f"losses of stage {stage.name} over its steps")


def add_shares(panel: Any, stage: Stage) -> None:
    """Draw metrics and sparsity, all from 0 to 1, on an axis of their own."""
    curves = stage.curves
    assert curves is not None
    metrics = curves.shares
    if not curves.schedule and not metrics:
        return
    second = panel.twinx()
    second.spines["right"].set_visible(True)
    if curves.schedule:
        steps, sparsities = zip(*[*curves.schedule, (curves.steps, curves.schedule[-1][1])], strict=True)
        second.step(steps, sparsities, where="post", color=SPARSITY, linestyle="--", label="sparsity")
        second.set_ylim(0, 1)
    for (name, points), colour in zip(metrics.items(), cycle(COLOURS[::-1]), strict=False):
        second.plot(*zip(*points, strict=True), "s-", color=colour, label=f"dev {name}", markersize=3, linewidth=1)
    second.set_ylabel("sparsity" if not metrics else "metric" if not curves.schedule else "sparsity, metric")


def draw_map(
    grid: Grid,
    title: str,
    value: Callable[[LayerRow], float | None],
    limits: tuple[float, float] | None = None,
    form: str = ".0f",
) -> str:
    """Draw a heat map of one number per layer.

    Args:
        value: of a layer; None for an empty cell.
        limits: of the colours; by default the smallest and the largest value.
        form: format of the number in each cell.
    """
    values = [
        [math.nan if cell is None or (number := value(cell)) is None else number for cell in row] for row in grid.cells
    ]
    numbers = [each for row in values for each in row if math.isfinite(each)]
    if limits is None:
        limits = (min(numbers), max(numbers)) if len(set(numbers)) > 1 else (0.0, max([*numbers, 0.0]) or 1.0)
    low, high = limits

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        mesh = panel.pcolormesh(values, cmap="viridis", vmin=low, vmax=high, edgecolors="white", linewidth=0.5)
        panel.invert_yaxis()
        panel.set_xticks([column + 0.5 for column in range(len(grid.columns))], grid.columns, rotation=40, ha="right")
        panel.set_yticks([row + 0.5 for row in range(len(grid.rows))], grid.rows)
        panel.set_ylabel("block" if grid.regular else "layer no.")
        panel.tick_params(length=0, labelsize=8)
        panel.spines[:].set_visible(False)
        panel.set_title(title, loc="left", fontsize=9)  # a label of a short colour bar would be cut
        figure.colorbar(mesh, ax=panel).solids.set(rasterized=False, edgecolor="face")
        for row, column in np.argwhere(np.isfinite(values)) if len(numbers) <= MAX_NUMBERED_CELLS else ():
            number = values[row][column]
            colour = "black" if number > (low + high) / 2 else "white"
            text = format(number, form)
            panel.text(column + 0.5, row + 0.5, text, color=colour, ha="center", va="center", fontsize=7)

    height = 1.2 + 0.24 * len(grid.rows) + (0.5 if grid.regular else 0.0)
    return svg(height, draw, f"{title} of every layer")


def draw_activations(activations: Sequence[Activation]) -> str:
    """Return an SVG: each site's histogram as a strip over |x| / amax, the range of int8, and what saturates."""
    highest = min(max(len(each.counts) * each.width / each.amax for each in activations), MAX_RATIO)
    edges = np.linspace(0, max(highest, 1.0), NUM_BINS + 1)
    with np.errstate(divide="ignore"):
        strips = np.log10([rebin(each, edges) for each in activations])

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        mesh = panel.pcolormesh(edges, range(len(activations) + 1), strips, cmap="viridis", vmin=-7, vmax=0)
        panel.axvline(1, color=COLOURS[1], linewidth=1.2, label="amax")
        mark_percentiles(panel, activations, float(edges[-1]))
        panel.invert_yaxis()
        sites = strip_prefix([each.site for each in activations])
        panel.set_yticks([row + 0.5 for row in range(len(activations))], sites)
        panel.tick_params(axis="y", length=0, labelsize=7)
        panel.set_xlabel(f"|x| / amax{', last column: all above' if highest == MAX_RATIO else ''}")
        bar = figure.colorbar(mesh, ax=panel, label="share of the values", shrink=0.9, ticks=[-6, -4, -2, 0])
        bar.ax.set_yticklabels(["1e-6", "1e-4", "1 %", "all"])
        bar.solids.set(rasterized=False, edgecolor="face")
        figure.legend(loc="outside upper right", fontsize=8)

    return svg(1.1 + 0.125 * len(activations), draw, "activations of every site and their amax")


def strip_prefix(names: Sequence[str]) -> list[str]:
    """Remove the modules that all names begin with: the figure is narrow."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    num_shared = len([*takewhile(lambda level: len(set(level)) == 1, levels)])
    return [".".join(name.split(".")[num_shared:]) for name in names]


def mark_percentiles(panel: Any, activations: Sequence[Activation], end: float) -> None:
    """Mark on each strip the |x| that 99.99 % of the values do not exceed."""
    points = [(each.percentile / each.amax, row + 0.5) for row, each in enumerate(activations)
              if each.percentile <= end * each.amax]  # fmt: skip
    if points:
        panel.plot(*zip(*points, strict=True), "|", color="white", markersize=5, markeredgewidth=2.4)
        panel.plot(*zip(*points, strict=True), "|", color="black", markersize=5, markeredgewidth=1)
        panel.plot([], [], "|", color=INK, markersize=6, label="99.99 % of the values")


def rebin(activation: Activation, edges: Floats) -> Floats:
    """Return the share of values [C] between edges [C + 1] of |x| / amax; the last holds all above."""
    counts = np.asarray(activation.counts, np.float64)
    bins = np.arange(len(counts) + 1) * activation.width / activation.amax
    below = np.interp(edges, bins, np.concatenate([[0.0], counts.cumsum()]))
    below[-1] = counts.sum()
    return np.asarray(np.diff(below) / counts.sum())


def draw_trade(run: Run, setting: LatencySetting) -> str:
    """Draw metric over latency, a point per result; empty if fewer than two results have both."""
    metrics = {row.label: row.metrics[run.metric] for row in run.results if run.metric in row.metrics}
    points = [(name, latency.p50_ms, metrics[label]) for name, latency in setting.rows.items()
              if math.isfinite(metrics.get(label := name.partition("@")[0], math.nan))]  # fmt: skip
    if len(points) < 2:
        return ""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for (name, time, metric), colour in zip(points, cycle(COLOURS), strict=False):
            marker = "o" if name.startswith("dense") else "s"
            panel.plot(time, metric, marker, color=colour, label=name, markersize=7)
        panel.set_xlim(left=0, right=1.1 * max(time for _, time, _ in points))
        panel.margins(y=0.2)
        panel.set_xlabel(f"ms per call, {setting.title}")
        panel.set_ylabel(run.metric)
        panel.grid(visible=True, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=1, fontsize=8)

    return svg(2.6 + 0.17 * len(points), draw, f"{run.metric} over latency, {setting.title}")
