"""The plot of a bench report: a panel per input size, a bar per candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqat.bench.report import Report, Setting, size_text
from sqat.plots.figure import blank_figure, save_figure

BAR, TAIL, BASELINE = "#3b6ea5", "#b5541c", "#8a8f98"
PANEL, LINE = 0.7, 0.34  # inches a panel and a candidate


def save_plot(report: Report, path: Path) -> None:
    """Draw a report to a file of a format that matplotlib writes (PNG, SVG, PDF).

    Raises:
        SqatError: matplotlib is not installed, or does not write the format.
    """
    height = sum(PANEL + LINE * len(setting.rows) for setting in report.settings)
    figure = blank_figure(8, 0.6 + height)
    panels = figure.subplots(len(report.settings), 1, squeeze=False)[:, 0]
    for panel, setting in zip(panels, report.settings, strict=True):
        draw_setting(panel, setting, report.baseline)
    panels[-1].set_xlabel("ms per call: median with its 95 % interval, and p95 (|)")
    figure.suptitle(f"{report.cpu or 'unknown CPU'}, {report.threads} thread{'s' * (report.threads > 1)}", fontsize=10)
    save_figure(figure, path)


def draw_setting(panel: Any, setting: Setting, baseline: str) -> None:
    """Draw one input size."""
    names = list(setting.rows)[::-1]
    timings = [setting.rows[name] for name in names]
    medians = [timing.p50_ms.median for timing in timings]
    low = [timing.p50_ms.median - timing.p50_ms.low for timing in timings]
    high = [timing.p50_ms.high - timing.p50_ms.median for timing in timings]
    colours = [BASELINE if name == baseline else BAR for name in names]
    panel.barh(names, medians, xerr=(low, high), color=colours, height=0.6)
    panel.plot([timing.p95_ms for timing in timings], names, "|", color=TAIL, markersize=12)
    panel.set_title(size_text(setting.batch, setting.sequence), fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
