"""What a run folder holds, read once: recipe, stages, results, latencies, curves, layers, lint findings.

What is absent is listed in ``missing``. Nothing is run again: a report never changes a run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqat.checkpoint.manifest import HISTOGRAMS, RECIPE, Manifest, load_manifest
from sqat.checkpoint.store import load_checkpoint
from sqat.errors import SqatError
from sqat.evaluation.inspection import inspect_checkpoint
from sqat.files.read import parse_json, try_read_object
from sqat.lint.apply_rules import parse_target
from sqat.lint.layer_report import LintReport
from sqat.lint.layer_row import LayerRow
from sqat.lint.repair_file import lint_file
from sqat.lint.rules.table import TARGETS as LINT_TARGETS
from sqat.pipeline.bootstrap import Samples, read_samples
from sqat.pipeline.graph import StageGraph, resolve_graph
from sqat.pipeline.quality_gates import describe_gates, first_failed_gate, gate_limits
from sqat.pipeline.result_files import RESULTS_FILE, artifact_size, result_artifacts
from sqat.progress import Reporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import StageConfig
from sqat.recipe.targets import TARGETS
from sqat.report.curves import Curves, curves_of
from sqat.report.folder import newest_stage
from sqat.report.latencies import LatencySetting, read_latencies
from sqat.report.parts import read_part
from sqat.training.metrics_log import METRICS_FILE
from sqat.training.metrics_log import read_metrics as read_metrics_log

RUN_RECORD = "run.json"


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe; ``manifest`` is None if it has not run."""

    name: str
    config: StageConfig
    manifest: Manifest | None
    curves: Curves | None


@dataclass(frozen=True)
class Result:
    """One row of the results table.

    Attributes:
        metrics: on the run's split; empty if not measured.
        stale: whether the metrics were measured on an earlier file.
        samples: metrics on the bootstrap samples of the split; empty if unknown.
    """

    label: str
    stage: str
    path: Path
    metrics: Mapping[str, float]
    size_bytes: int | None
    stale: bool
    samples: Samples = field(default_factory=dict)


@dataclass(frozen=True)
class Activation:
    """The activations of one site during calibration.

    Attributes:
        amax: the largest |x| that int8 represents at the site.
        width: of a histogram bin.
        counts: values in each bin [i * width, (i + 1) * width) of |x|.
        saturated: share of the values above amax.
        percentile: the |x| that 99.99 % of the values do not exceed.
    """

    site: str
    amax: float
    width: float
    counts: list[int]
    saturated: float | None
    percentile: float


@dataclass(frozen=True)
class LintedFile:
    """The lint findings of an exported file; ``lint`` is None, with a reason in ``problem``, if there are none."""

    label: str
    file: str
    target: str
    lint: LintReport | None
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """All of a run.

    Attributes:
        metric: the recipe's main metric; higher is better.
        layers: of the checkpoint of stage ``layers_of``, the last that was pruned or quantized.
        activations: of the last calibrate stage.
        gates: each stage's gates, and whether its result passes them.
        record: how `scripts/results/make` started the run; empty for other runs.
        missing: what a report would show and the folder does not have.
    """

    directory: Path
    loaded: LoadedRecipe
    metric: str
    split: str
    data_digest: str
    stages: list[Stage]
    results: list[Result]
    latencies: list[LatencySetting]
    layers: list[LayerRow]
    layers_of: str
    activations: list[Activation]
    gates: list[str]
    lints: list[LintedFile]
    record: Mapping[str, Any]
    missing: list[str]

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Stage -> manifest of every stage that has run."""
        return {stage.name: stage.manifest for stage in self.stages if stage.manifest is not None}


def read_run(directory: Path, reporter: Reporter) -> Run:
    """Read a run folder.

    Raises:
        SqatError: it holds no stage, or a damaged one.
    """
    loaded = read_recipe(directory)
    graph, missing = resolve_graph(loaded), list[str]()
    stages = read_stages(graph, directory, missing)
    results, split, digest = read_results(graph, missing)
    latencies = read_latencies(directory, {row.label: row.path for row in results}, missing)
    no_layers: tuple[str, list[LayerRow]] = ("", [])
    layers_of, layers = read_part(missing, "layers", no_layers, lambda: read_layers(graph, stages, reporter))
    metric = str(loaded.recipe.task.metric)
    measured = list(dict.fromkeys(name for row in results for name in row.metrics))
    return Run(
        directory=directory,
        loaded=loaded,
        metric=metric if metric in measured else next(iter(measured), metric),
        split=split,
        data_digest=digest,
        stages=stages,
        results=results,
        latencies=latencies,
        layers=layers,
        layers_of=layers_of,
        activations=read_part(missing, "activations", [], lambda: read_activations(graph, stages)),
        gates=[
            f"{stage.name} ({'; '.join(describe_gates(graph.nodes[stage.name]))}): {check_gates(graph, stage)}"
            for stage in stages
            if stage.config.gates
        ],
        lints=read_part(missing, "lint", [], lambda: read_lints(results, reporter)),
        record=try_read_object(directory / RUN_RECORD, root=directory),
        missing=missing,
    )


def read_recipe(directory: Path) -> LoadedRecipe:
    """Load the recipe that the newest stage keeps, with this folder as its run folder."""
    newest = newest_stage(directory)
    loaded = load_recipe(newest / RECIPE, load_manifest(newest).overrides)
    folder = directory.resolve()
    recipe = loaded.recipe.model_copy(update={"output": str(folder.parent), "name": folder.name})
    return loaded.model_copy(update={"recipe": recipe})


def read_stages(graph: StageGraph, directory: Path, missing: list[str]) -> list[Stage]:
    """Read every stage of the recipe with its curves."""
    path = directory / METRICS_FILE
    entries = read_part(missing, "loss curves", list[dict[str, Any]](), lambda: [*read_metrics_log(path)])
    if not entries:
        missing.append(f"loss curves: no {METRICS_FILE} with readable lines, so only the last step is shown")
    stages = []
    for node in graph.nodes.values():
        manifest = node.manifest
        if manifest is None:
            missing.append(f"stage {node.name}: {describe_absence(node.directory)}")
        curves = None
        if manifest is not None and manifest.steps > 0:
            read = partial(curves_of, manifest, node.config, entries)
            curves = read_part(missing, f"curves of stage {node.name}", None, read)
        stages.append(Stage(node.name, node.config, manifest, curves))
    return stages


def describe_absence(directory: Path) -> str:
    """Say why a stage has no manifest."""
    if not os.path.lexists(directory):
        return "has not run"
    if directory.is_symlink():
        return "is left out, since its folder is a link, which is not followed"
    try:
        load_manifest(directory)
    except SqatError as error:
        return f"is left out: {error.problem}"
    return "has not run"


def read_results(graph: StageGraph, missing: list[str]) -> tuple[list[Result], str, str]:
    """Read the results table, its split and its data digest."""
    directory = graph.loaded.run_directory
    entries = try_read_object(directory / RESULTS_FILE, root=directory)
    entries = {label: entry for label, entry in entries.items() if isinstance(entry, dict)}
    rows, samples = [], read_samples(directory)
    for label, (node, path) in result_artifacts(graph).items():
        entry, manifest = entries.get(label, {}), node.manifest
        metrics = read_metrics(entry)
        stale = bool(entry) and (manifest is None or not str(entry.get("key", "")).startswith(manifest.sha256))
        if not entry:
            missing.append(f"result {label}: not measured (sqat run measures it)")
        elif not metrics:
            missing.append(
                f"result {label}: {RESULTS_FILE} holds no readable metrics; delete it and run sqat run again"
            )
        if stale:
            missing.append(f"result {label}: measured on an earlier file than the one in the folder")
        rows.append(Result(label, node.name, path, metrics, artifact_size(path) or None, stale,
                           samples.get(str(entry.get("key")), {})))  # fmt: skip
    first: dict[str, Any] = next(iter(entries.values()), {})
    return rows, str(first.get("split", "")), str(first.get("data", ""))


def read_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """Read the metrics of one entry; empty if they are damaged."""
    try:
        return {str(name): float(value) for name, value in entry["metrics"].items()}
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError):
        return {}


def read_layers(graph: StageGraph, stages: list[Stage], reporter: Reporter) -> tuple[str, list[LayerRow]]:
    """Read the layers of the last pruned or quantized stage, or else of the last stage with weights."""
    trained = [stage for stage in stages if stage.manifest is not None and stage.config.type != "export"]
    compressed = [stage for stage in trained if stage.manifest is not None and stage.manifest.layers]
    if not trained:
        return "", []
    name = (compressed or trained)[-1].name
    reporter.info(f"reading the layers of {name}")
    return name, inspect_checkpoint(graph.nodes[name].directory)


def read_activations(graph: StageGraph, stages: list[Stage]) -> list[Activation]:
    """Read the histograms of the last calibrate stage, site by site."""
    manifests = [stage.manifest for stage in stages if stage.manifest is not None and stage.config.type == "calibrate"]
    if not manifests or HISTOGRAMS not in manifests[-1].files:
        return []
    manifest = manifests[-1]
    checkpoint = load_checkpoint(graph.nodes[manifest.stage].directory)
    histograms: dict[str, Any] = parse_json(checkpoint.files[HISTOGRAMS], HISTOGRAMS)
    activations = [
        Activation(site, float(checkpoint.amax[manifest.sites[site].shared_with]), float(each["width"]),
                   [int(count) for count in each["counts"]], manifest.sites[site].saturated, float(each["covers"]))
        for site, each in histograms.items()
    ]  # fmt: skip
    for each in activations:
        if not (each.counts and min(each.counts) >= 0 and sum(each.counts) and 0 < each.width < math.inf):
            raise ValueError(f"{HISTOGRAMS} holds no histogram of {each.site}")
    return activations


def check_gates(graph: StageGraph, stage: Stage) -> str:
    """Say whether a stage passes its gates, or why that is unknown."""
    if stage.manifest is None:
        return "unknown, the stage has not run"
    try:
        node = graph.nodes[stage.name]
        limits = gate_limits(graph, node, node.parent_manifest)
    except SqatError as error:
        return f"unknown: {error.problem}"
    except OSError as error:  # an input of the run that is gone
        return f"unknown: {error.strerror}"
    failure = first_failed_gate(limits, stage.manifest.metrics)
    return f"missed: {failure}" if failure else "passed"


def read_lints(results: list[Result], reporter: Reporter) -> list[LintedFile]:
    """Lint every exported ONNX file of the results once."""
    files = {row.path: row.label for row in reversed(results) if row.path.suffix == ".onnx" and row.path.is_file()}
    linted = []
    for path, label in reversed(files.items()):
        reporter.info(f"linting {path.parent.name}/{path.name}")
        linted.append(lint_result(label, path))
    return linted


def lint_result(label: str, path: Path) -> LintedFile:
    """Lint one file by the rules of the target that it is named after."""
    target = next((name for name, target in TARGETS.items() if target.file == path.name), "")
    file = f"{path.parent.name}/{path.name}"
    if target not in LINT_TARGETS:
        return LintedFile(label, file, target or "unknown", None, "the linter has no rules for this target")
    try:
        return LintedFile(label, file, target, lint_file(path, parse_target(target)))
    except SqatError as error:
        return LintedFile(label, file, target, None, error.problem)
