"""The report: one HTML file without scripts, rendered from `page.html` by Jinja2 with every value escaped."""

from __future__ import annotations

import math
import shlex
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqat import __version__
from sqat.checkpoint.outputs import MADE_BY, check_output
from sqat.errors import SqatError
from sqat.files.replace import replace_file
from sqat.progress import Reporter
from sqat.report.figures import draw_activations, draw_curves, draw_map, draw_trade
from sqat.report.grid import Grid, make_grid
from sqat.report.parts import read_part
from sqat.report.read_run import LintedFile, Result, Run, Stage, read_run
from sqat.report.summary import dense_baseline, difference_to_dense, format_metric, headline, remarks

NAME = "report.html"
MAX_FINDINGS = 5  # of one file; the others are counted


def write_page(directory: Path, output: Path | None, reporter: Reporter) -> Path:
    """Write the report of a run folder, by default into that folder, and return its path.

    Raises:
        SqatError: the folder holds no run, Jinja2 or matplotlib is not installed, or see `check_output`.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  # checked here, before anything is read
    except ImportError as error:
        hint = "pip install 'sqat[report]'"
        raise SqatError(f"{error.name} is not installed", hint, "sqat report", code="missing-package") from error
    path = output / NAME if output is not None and output.is_dir() else output or directory / NAME
    check_output(path, ".html")
    run = read_run(directory, reporter)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(files("sqat.report").joinpath("page.html").read_text(encoding="utf-8"))
    replace_file(path, template.render(template_values(run)).encode())
    return path


def template_values(run: Run) -> dict[str, Any]:
    """Return the values of the template, in its order; SVG is the only markup among them."""
    from markupsafe import Markup

    grid = make_grid(run.layers) if run.layers else None
    draw = partial(read_part, run.missing)
    trades = [draw(f"figure of {setting.title}", "", partial(draw_trade, run, setting)) for setting in run.latencies]
    trained = [stage for stage in run.stages if stage.curves is not None]
    metrics = dict.fromkeys(name for row in run.results for name in row.metrics)
    saturated = [each for each in run.activations if each.saturated]
    return {
        "name": run.directory.resolve().name,
        "version": __version__,
        "made_by": MADE_BY,
        "run": run,
        "about": about(run),
        "headline": headline(run),
        "remarks": list(remarks(run)),
        "columns": sorted(metrics, key=lambda name: name != run.metric),
        "rows": [result_cells(run, row) for row in run.results],
        "trades": [Markup(each) for each in trades if each],
        "curves": [
            (stage.name, curve_note(stage), Markup(draw(f"curves of {stage.name}", "", partial(draw_curves, stage))))
            for stage in trained
        ],
        "maps": [Markup(each) for each in draw("maps", list[str](), partial(draw_maps, run, grid))] if grid else [],
        "grid": grid,
        "has_methods": any(layer.method for layer in run.layers),
        "activations": Markup(draw("activations", "", partial(draw_activations, run.activations)))
        if run.activations
        else "",
        "saturated": sorted(saturated, key=lambda each: -(each.saturated or 0.0))[:MAX_FINDINGS],
        "stages": [stage_cells(stage, run.metric) for stage in run.stages],
        "lints": [lint_cells(each) for each in run.lints],
        "overrides": run.loaded.overrides,
        "commands": commands(run),
        "versions": versions(run),
        "digests": digests(run),
        "show": format_metric,
    }


def draw_maps(run: Run, grid: Grid) -> list[str]:
    """Draw the heat maps of the layers: zeros, and for a quantized model SQNR and saturation."""
    maps = [draw_map(grid, "zeros, %", lambda layer: 100 * layer.zeros, (0.0, 100.0))]
    if any(layer.sqnr_db is not None for layer in run.layers):
        maps.append(draw_map(grid, "weight SQNR, dB", lambda layer: layer.sqnr_db))
    if any(layer.saturated is not None for layer in run.layers):
        percent = lambda layer: None if layer.saturated is None else 100 * layer.saturated  # noqa: E731
        maps.append(draw_map(grid, "saturated inputs, %", percent, form=".2g"))
    return maps


def about(run: Run) -> list[tuple[str, str]]:
    """Return label and text of the run's first facts."""
    recipe, manifests = run.loaded.recipe, run.manifests
    minutes = sum(manifest.seconds for manifest in manifests.values()) / 60
    return [
        ("model", recipe.model.label),
        ("task", f"{recipe.task.name}, by {run.metric}"),
        ("measured on", run.split or "nothing yet"),
        ("seed", str(recipe.seed)),
        ("stages", f"{len(manifests)} of {len(run.stages)} have run, in {minutes:.1f} minutes"),
    ]


def result_cells(run: Run, row: Result) -> dict[str, Any]:
    """Return the cells of one row of the results table."""
    dense, difference = dense_baseline(run.results), difference_to_dense(run, row)
    change = math.nan
    if dense is not None and dense is not row and run.metric in row.metrics and run.metric in dense.metrics:
        change = row.metrics[run.metric] - dense.metrics[run.metric]
    interval = ""
    if difference is not None and difference.has_interval:
        interval = f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    latencies = [
        [(name.partition("@")[2], latency, name == setting.baseline) for name, latency in setting.rows.items()
         if name.partition("@")[0] == row.label]
        for setting in run.latencies
    ]  # fmt: skip
    return {
        "row": row,
        "change": f"{change:+.4f}{interval}" if math.isfinite(change) else "-",
        "megabytes": "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.3g}",
        "latencies": latencies,
    }


def curve_note(stage: Stage) -> str:
    """Say how many points a curve has, and which metrics are not drawn."""
    assert stage.curves is not None
    num_points = max((len(points) for points in stage.curves.losses.values()), default=0)
    note = f"{num_points} of {stage.curves.steps} steps"
    others = [f"dev {name} {format_metric(points[-1][1])}" for name, points in stage.curves.metrics.items()
              if name not in stage.curves.shares]  # fmt: skip
    return note + (f"; not drawn on an axis of 0 to 1, last values: {', '.join(others)}" if others else "")


def stage_cells(stage: Stage, metric: str) -> dict[str, Any]:
    """Return the cells of one row of the table of stages."""
    metrics = {} if stage.manifest is None else stage.manifest.metrics.get("dev", {})
    dev = format_metric(metrics[metric]) if metric in metrics else "-"
    return {"stage": stage, "manifest": stage.manifest, "dev": dev}


def lint_cells(linted: LintedFile) -> dict[str, Any]:
    """Return the cells of one linted file; equal findings form a group."""
    from sqat.lint.show import group_findings, summary

    if linted.lint is None:
        return {"linted": linted, "summary": linted.problem, "groups": [], "more": 0, "reasons": []}
    groups = [(group.first, len(group.nodes)) for group in group_findings(linted.lint.findings)]
    return {
        "linted": linted,
        "summary": summary(linted.lint),
        "groups": groups[:MAX_FINDINGS],
        "more": len(groups[MAX_FINDINGS:]),
        "reasons": linted.lint.reasons[:MAX_FINDINGS],
    }


def commands(run: Run) -> list[str]:
    """Return the commands that reproduce the run and the report."""
    command = run.record.get("command")
    if not isinstance(command, list) or not command:
        names = [manifest.recipe_file for manifest in run.manifests.values() if manifest.recipe_file]
        recipe = names[-1] if names else str(run.loaded.path)
        command = ["sqat", "run", recipe, *(part for each in run.loaded.overrides for part in ("--set", each))]
    return [shlex.join(map(str, command)), shlex.join(["sqat", "report", str(run.directory)])]


def versions(run: Run) -> dict[str, str]:
    """Return the versions of packages that the run recorded, and the commit if known."""
    merged: dict[str, str] = {}
    for manifest in run.manifests.values():
        merged |= manifest.versions
    recorded = run.record.get("versions")
    merged |= {str(name): str(value) for name, value in recorded.items()} if isinstance(recorded, dict) else {}
    commit = run.record.get("commit")
    return merged | ({"commit": str(commit)} if commit else {})


def digests(run: Run) -> list[tuple[str, str]]:
    """Return model, data and stages, each with its digest."""
    model, data = run.loaded.recipe.model, run.loaded.recipe.data
    rows = [(f"model {model.label}", model.sha256 or "not pinned by the recipe")]
    if run.data_digest:
        rows.append((f"data, split {run.split}", run.data_digest))
    splits = {"train": data.train, "dev": data.dev, "test": data.test}
    rows += [(f"data.{name}", split.path or split.hub or "") for name, split in splits.items() if split is not None]
    rows += [
        (f"stage {name}: fingerprint, manifest", f"{each.fingerprint} {each.sha256}")
        for name, each in run.manifests.items()
    ]
    return rows
