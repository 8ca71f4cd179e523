"""The page: one HTML file with everything in it, made from `page.html` by Jinja2 with every value escaped.

Left out: scripts. What a reader can fold away are the browser's own `details`, which print open.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqat import __version__
from sqat.checkpoint.atomic_write import replace_file
from sqat.errors import SqatError
from sqat.lint.layer_row import LayerRow
from sqat.progress import Reporter
from sqat.report.collecting import Activation, Linted, Result, Run, Stage, collect
from sqat.report.figures import draw_activations, draw_curves, draw_map, draw_trade
from sqat.report.grid import make_grid
from sqat.report.verdict import baseline_of, figure, headline, remarks

NAME = "report.html"
SEVERAL = 5  # findings of one file that are shown before the rest is counted


def write_page(directory: Path, output: Path | None, reporter: Reporter) -> Path:
    """Write the report of a run's folder, by default into it, and return where it is.

    Raises:
        SqatError: no run there, or Jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  # told here, before anything is read
    except ImportError as error:
        raise SqatError(f"{error.name} is not installed", "pip install 'sqat[report]'", "sqat report") from error
    run = collect(directory, reporter)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(files("sqat.report").joinpath("page.html").read_text(encoding="utf-8"))
    path = output / NAME if output is not None and output.is_dir() else output or directory / NAME
    replace_file(path, template.render(contents(run)).encode())
    return path


def contents(run: Run) -> dict[str, Any]:
    """What the template shows, in its order; SVG is the only markup among it."""
    from markupsafe import Markup

    grid = make_grid(run.layers) if run.layers else None
    maps = []
    if grid is not None:
        maps.append(draw_map(grid, "zeros, %", lambda layer: 100 * layer.zeros, (0.0, 100.0)))
        if any(layer.sqnr_db is not None for layer in run.layers):
            maps.append(draw_map(grid, "weight SQNR, dB", lambda layer: layer.sqnr_db))
        if any(layer.saturated is not None for layer in run.layers):
            maps.append(draw_map(grid, "saturated inputs, %", percent_saturated, form=".2g"))
    trades = [draw_trade(run, setting) for setting in run.speeds]
    fitted = [stage for stage in run.stages if stage.curves is not None]
    return {
        "name": run.directory.resolve().name,
        "version": __version__,
        "run": run,
        "about": about(run),
        "headline": headline(run),
        "remarks": list(remarks(run)),
        "columns": metric_columns(run),
        "rows": [result_cells(run, row) for row in run.results],
        "trades": [Markup(each) for each in trades if each],
        "curves": [(stage.name, points_note(stage), Markup(draw_curves(stage))) for stage in fitted],
        "maps": [Markup(each) for each in maps],
        "grid": grid,
        "activations": Markup(draw_activations(run.activations)) if run.activations else "",
        "clipped": sorted((each for each in run.activations if each.saturated), key=most_clipped)[:SEVERAL],
        "stages": [stage_cells(stage, run.metric) for stage in run.stages],
        "lints": [lint_cells(each) for each in run.lints],
        "overrides": newest_overrides(run),
        "commands": commands(run),
        "versions": versions(run),
        "digests": digests(run),
        "show": figure,
    }


def percent_saturated(layer: LayerRow) -> float | None:
    """Percent of the layer's inputs that calibration saw beyond their bound."""
    return None if layer.saturated is None else 100 * layer.saturated


def most_clipped(activation: Activation) -> float:
    """Key that sorts the site that loses most of its values first."""
    return -(activation.saturated or 0.0)


def about(run: Run) -> list[tuple[str, str]]:
    """The run in a few words."""
    recipe = run.loaded.recipe
    done = [stage for stage in run.stages if stage.manifest is not None]
    seconds = sum(stage.manifest.seconds for stage in done if stage.manifest is not None)
    return [
        ("model", recipe.model.label),
        ("task", f"{recipe.task.name}, judged by {run.metric}"),
        ("measured on", run.split or "nothing yet"),
        ("seed", str(recipe.seed)),
        ("stages", f"{len(done)} of {len(run.stages)} have run, {seconds / 60:.1f} minutes of work"),
    ]


def metric_columns(run: Run) -> list[str]:
    """Metrics in their order, the one that the recipe judges by first."""
    names = dict.fromkeys(name for row in run.results for name in row.metrics)
    return sorted(names, key=lambda name: name != run.metric)


def result_cells(run: Run, row: Result) -> dict[str, Any]:
    """One row of the table of quality and speed."""
    dense = baseline_of(run.results)
    change = None
    if dense is not None and dense is not row and run.metric in row.metrics and run.metric in dense.metrics:
        change = row.metrics[run.metric] - dense.metrics[run.metric]
    speeds = []
    for setting in run.speeds:
        found = {name: speed for name, speed in setting.rows.items() if name.partition("@")[0] == row.label}
        speeds.append([(name.partition("@")[2], speed, name == setting.baseline) for name, speed in found.items()])
    megabytes = "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.3g}"
    shown = "-" if change is None or not math.isfinite(change) else f"{change:+.4f}"
    return {"row": row, "change": shown, "megabytes": megabytes, "speeds": speeds}


def points_note(stage: Stage) -> str:
    """How much of a curve is known."""
    assert stage.curves is not None
    most = max((len(points) for points in stage.curves.losses.values()), default=0)
    note = f"{stage.curves.steps} steps, of which {most} {'is' if most == 1 else 'are'} known"
    beyond = [f"dev {name} {figure(points[-1][1])}" for name, points in stage.curves.metrics.items()
              if name not in stage.curves.shares]  # fmt: skip
    return note + (f"; at the end, and not drawn on an axis of 0 to 1: {', '.join(beyond)}" if beyond else "")


def stage_cells(stage: Stage, metric: str) -> dict[str, Any]:
    """One row of the table of stages."""
    manifest = stage.manifest
    metrics: Mapping[str, float] = {} if manifest is None else manifest.metrics.get("dev", {})
    return {"stage": stage, "manifest": manifest, "dev": figure(metrics[metric]) if metric in metrics else "-"}


def lint_cells(linted: Linted) -> dict[str, Any]:
    """One file with its findings, alike ones together."""
    from sqat.lint.show import group_findings, summary

    if linted.lint is None:
        return {"linted": linted, "summary": linted.problem, "groups": [], "more": 0, "reasons": []}
    groups = [(group.first, len(group.nodes)) for group in group_findings(linted.lint.findings)]
    return {
        "linted": linted,
        "summary": summary(linted.lint),
        "groups": groups[:SEVERAL],
        "more": len(groups) - len(groups[:SEVERAL]),
        "reasons": linted.lint.reasons[:SEVERAL],
    }


def newest_overrides(run: Run) -> Sequence[str]:
    """What was set beside the recipe's text."""
    return run.loaded.overrides


def commands(run: Run) -> list[str]:
    """What to type for the same run and the same page."""
    recorded = run.record.get("command")
    if isinstance(recorded, list) and recorded:
        first = [str(part) for part in recorded]
    else:
        first = ["sqat", "run", "recipe.yaml", *(part for each in run.loaded.overrides for part in ("--set", each))]
    return [shlex.join(first), shlex.join(["sqat", "report", str(run.directory)])]


def versions(run: Run) -> dict[str, str]:
    """Versions of packages as the run recorded them, and the repository's commit where that is known."""
    found: dict[str, str] = {}
    for stage in run.stages:
        if stage.manifest is not None:
            found |= stage.manifest.versions
    recorded = run.record.get("versions")
    found |= {str(name): str(value) for name, value in recorded.items()} if isinstance(recorded, dict) else {}
    commit = run.record.get("commit")
    return found | ({"commit": str(commit)} if commit else {})


def digests(run: Run) -> list[tuple[str, str]]:
    """What was read and made, by digest."""
    model, data = run.loaded.recipe.model, run.loaded.recipe.data
    found = [(f"model {model.label}", model.sha256 or "not pinned by the recipe")]
    if run.data_digest:
        found.append((f"data, split {run.split}", run.data_digest))
    for name in ("train", "dev", "test"):
        split = getattr(data, name)
        if split is not None:
            found.append((f"data.{name}", split.path or split.hub or ""))
    found += [(f"stage {stage.name}: key, manifest", f"{stage.manifest.key} {stage.manifest.sha256}")
              for stage in run.stages if stage.manifest is not None]  # fmt: skip
    return found
