"""The report's figures as inline SVG that follows the page: its font, its text colour, light and dark.

matplotlib draws text and axes in one marker colour that is replaced by ``currentColor``; everything that refers to
anything outside (metadata, namespaces) is taken out. Narrow, so that the text stays readable on a telephone.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqat.lint.layer_row import LayerRow
from sqat.report.collecting import Activation, Run, Stage
from sqat.report.grid import Grid
from sqat.report.speeds import SpeedSetting

INK = "#010203"
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733", "#66a5bb", "#aa3377")
SPARSITY = "#999999"
WIDTH = 4.5  # inches: no wider than a telephone, so that 7 points stay 7 pixels
CELLS_WITH_NUMBERS = 100
COLUMNS, FARTHEST = 96, 4.0  # of the strips of activations; in units of the bound
Floats = NDArray[np.float64]


def style() -> AbstractContextManager[None]:
    """matplotlib's settings for these figures."""
    from matplotlib import rc_context

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(inked, INK)  # matplotlib's stubs list every key, those of other versions differ
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "sqat", "text.parse_math": False, "font.size": 9}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False}
    return rc_context(settings)


def svg(height: float, draw: Callable[[Any], None], title: str) -> str:
    """An SVG element of a figure that ``draw`` fills.

    Args:
        height: inches.
        title: for those who cannot see it.
    """
    from html import escape

    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = text.replace(INK, "currentColor").replace("xlink:href", "href")
    text = own_names(text, f"{zlib.crc32((title + text).encode()):x}")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def own_names(text: str, prefix: str) -> str:
    """The SVG with ids that no other figure of the page has."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{prefix}-", text)


def draw_curves(stage: Stage) -> str:
    """Losses of a stage, its dev metrics and the sparsity, over the steps."""
    curves = stage.curves
    assert curves is not None

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for (name, points), colour in zip(curves.losses.items(), cycle(COLOURS), strict=False):
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, ".-", color=colour, label=f"{name} loss", linewidth=1.2, markersize=4)
        positive = [value for points in curves.losses.values() for _, value in points]
        if positive and min(positive) > 0 and max(positive) > 20 * min(positive):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
        panel.set_xlabel("step")
        panel.set_ylabel("loss")
        add_second(panel, stage)
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)

    return svg(2.5, draw, f"losses of stage {stage.name} over its steps")


def add_second(panel: Any, stage: Stage) -> None:
    """What has another scale than the losses, all between 0 and 1: metrics and the sparsity."""
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
    what: str,
    value: Callable[[LayerRow], float | None],
    ends: tuple[float, float] | None = None,
    form: str = ".0f",
) -> str:
    """A heat map of one figure of every layer.

    Args:
        ends: of the colours; the smallest and the largest value without them.
        form: of the number in each cell.
    """
    values = [
        [math.nan if cell is None or (found := value(cell)) is None else found for cell in row] for row in grid.cells
    ]
    known = [each for row in values for each in row if math.isfinite(each)]

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        spread = ends or ((min(known), max(known)) if len(set(known)) > 1 else (0.0, max([*known, 0.0]) or 1.0))
        mesh = panel.pcolormesh(
            values, cmap="viridis", vmin=spread[0], vmax=spread[1], edgecolors="white", linewidth=0.5
        )
        panel.invert_yaxis()
        panel.set_xticks([column + 0.5 for column in range(len(grid.columns))], grid.columns, rotation=40, ha="right")
        panel.set_yticks([row + 0.5 for row in range(len(grid.rows))], grid.rows)
        panel.set_ylabel("block" if grid.regular else "layer no.")
        panel.tick_params(length=0, labelsize=8)
        for edge in panel.spines.values():
            edge.set_visible(False)
        panel.set_title(what, loc="left", fontsize=9)  # beside a bar of one or two rows it would be cut
        figure.colorbar(mesh, ax=panel).solids.set(rasterized=False, edgecolor="face")
        if len(known) <= CELLS_WITH_NUMBERS:
            number_cells(panel, values, spread, form)

    rows = len(grid.rows)
    return svg(1.2 + 0.24 * rows + (0.5 if grid.regular else 0.0), draw, f"{what} of every layer")


def draw_activations(activations: Sequence[Activation]) -> str:
    """Every site's values as a strip, in units of its bound: how much of int8's range is used, and what is clipped."""
    highest = min(max(len(each.counts) * each.width / each.bound for each in activations), FARTHEST)
    edges = np.linspace(0, max(highest, 1.0), COLUMNS + 1)
    with np.errstate(divide="ignore"):
        strips = np.log10([share_of_each(each, edges) for each in activations])

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        mesh = panel.pcolormesh(edges, range(len(activations) + 1), strips, cmap="viridis", vmin=-7, vmax=0)
        panel.axvline(1, color=COLOURS[1], linewidth=1.2, label="bound")
        mark_most(panel, activations, float(edges[-1]))
        panel.invert_yaxis()
        sites = without_prefix([each.site for each in activations])
        panel.set_yticks([row + 0.5 for row in range(len(activations))], sites)
        panel.tick_params(axis="y", length=0, labelsize=7)
        panel.set_xlabel(f"|x| over the bound{', last column: all beyond' if highest == FARTHEST else ''}")
        bar = figure.colorbar(mesh, ax=panel, label="share of the values", shrink=0.9, ticks=[-6, -4, -2, 0])
        bar.ax.set_yticklabels(["1e-6", "1e-4", "1 %", "all"])
        bar.solids.set(rasterized=False, edgecolor="face")
        figure.legend(loc="outside upper right", fontsize=8)

    return svg(1.1 + 0.125 * len(activations), draw, "activations of every site and the bounds of int8")


def without_prefix(names: Sequence[str]) -> list[str]:
    """Names without the modules that all of them begin with: the figure is narrow and its text must stay readable."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = len([*takewhile(lambda level: len(set(level)) == 1, levels)])
    return [".".join(name.split(".")[shared:]) for name in names]


def mark_most(panel: Any, activations: Sequence[Activation], end: float) -> None:
    """A tick in each strip where 99.99 % of the values are below it, where calibration kept it and it is in sight."""
    found = [(each.covers / each.bound, row + 0.5) for row, each in enumerate(activations)
             if each.covers is not None and each.covers <= end * each.bound]  # fmt: skip
    if found:
        panel.plot(*zip(*found, strict=True), "|", color="white", markersize=5, markeredgewidth=2.4)
        panel.plot(*zip(*found, strict=True), "|", color="black", markersize=5, markeredgewidth=1)
        panel.plot([], [], "|", color=INK, markersize=6, label="99.99 % of the values")


def share_of_each(activation: Activation, edges: Floats) -> Floats:
    """Share of a site's values [C] between the edges [C + 1], in units of its bound; the last has all beyond it."""
    counts = np.asarray(activation.counts, np.float64)
    upper = np.arange(len(counts) + 1) * activation.width / activation.bound
    below = np.interp(edges, upper, np.concatenate([[0.0], counts.cumsum()]))
    below[-1] = counts.sum()
    return np.asarray(np.diff(below) / counts.sum())


def number_cells(panel: Any, values: Sequence[Sequence[float]], spread: tuple[float, float], form: str) -> None:
    """Write the value into each cell, dark on light and light on dark."""
    middle = (spread[0] + spread[1]) / 2
    for row, some in enumerate(values):
        for column, each in enumerate(some):
            if math.isfinite(each):
                colour = "black" if each > middle else "white"
                panel.text(
                    column + 0.5, row + 0.5, format(each, form), color=colour, ha="center", va="center", fontsize=7
                )


def draw_trade(run: Run, setting: SpeedSetting) -> str:
    """Quality over latency, a point a result; empty where nothing has both."""
    metrics = {row.label: row.metrics[run.metric] for row in run.results if run.metric in row.metrics}
    points = [(name, speed.p50_ms, metrics[label]) for name, speed in setting.rows.items()
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
        panel.set_xlabel(f"ms a call, {setting.title}")
        panel.set_ylabel(run.metric)
        panel.grid(visible=True, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=1, fontsize=8)

    return svg(2.6 + 0.17 * len(points), draw, f"{run.metric} over latency, {setting.title}")
