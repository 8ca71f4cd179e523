"""What a run's folder holds, read once: recipe, stages, results, latencies, curves, layers, lint findings.

Whatever is not there is named in ``missing`` and nothing is run again: a report never changes a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqat.checkpoint.atomic_write import read_json_object
from sqat.checkpoint.manifest import HISTOGRAMS, RECIPE, Manifest, load_manifest
from sqat.checkpoint.store import load_checkpoint
from sqat.errors import SqatError
from sqat.evaluation.inspection import inspect_checkpoint
from sqat.lint.apply_rules import parse_target
from sqat.lint.layer_report import LintReport
from sqat.lint.layer_row import LayerRow
from sqat.lint.repair_file import lint_file
from sqat.lint.rules.table import TARGETS as LINT_TARGETS
from sqat.pipeline.fingerprint import Keys
from sqat.pipeline.quality_gates import limits_of, missed, show_limits
from sqat.pipeline.result_files import FILE, artifact_size, result_artifacts
from sqat.progress import Reporter
from sqat.recipe.loader import load_recipe
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import StageConfig
from sqat.recipe.targets import TARGETS
from sqat.report.curves import Curves, curves_of
from sqat.report.folder import newest_stage
from sqat.report.speeds import SpeedSetting, read_speeds

LOG, RUN_RECORD = "sqat.log", "run.json"


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe; no manifest where it has not run."""

    name: str
    config: StageConfig
    manifest: Manifest | None
    curves: Curves | None


@dataclass(frozen=True)
class Result:
    """One row of the closing table.

    Attributes:
        metrics: on the run's split; empty where they were not measured.
        stale: whether the figures are of an earlier file.
    """

    label: str
    stage: str
    path: Path
    metrics: Mapping[str, float]
    size_bytes: int | None
    stale: bool


@dataclass(frozen=True)
class Activation:
    """What calibration saw at one site.

    Attributes:
        bound: the largest |x| that int8 holds there.
        width: of a bin.
        counts: values in each bin [i * width, (i + 1) * width) of |x|.
        saturated: share of the values beyond the bound.
        covers: the |x| that 99.99 % of the values do not exceed; None where calibration did not keep it.
    """

    site: str
    bound: float
    width: float
    counts: list[int]
    saturated: float | None
    covers: float | None = None


@dataclass(frozen=True)
class Linted:
    """An exported file held against its target's rules; no lint, and the reason, where that cannot be."""

    label: str
    file: str
    target: str
    lint: LintReport | None
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """All of a run.

    Attributes:
        metric: the recipe's own, higher is better.
        layers: of the checkpoint of ``layers_of``, the last one that was pruned or quantized.
        activations: of the last calibrate stage.
        gates: each stage's limits, and whether its result keeps them.
        record: how `scripts/results/make` started it; empty where it did not.
        missing: what a report would show and the folder does not have.
    """

    directory: Path
    loaded: LoadedRecipe
    metric: str
    split: str
    data_digest: str
    stages: list[Stage]
    results: list[Result]
    speeds: list[SpeedSetting]
    layers: list[LayerRow]
    layers_of: str
    activations: list[Activation]
    gates: list[str]
    lints: list[Linted]
    record: Mapping[str, Any]
    missing: list[str]


def collect(directory: Path, reporter: Reporter) -> Run:
    """Read a run's folder.

    Raises:
        SqatError: it holds no stage of sqat's, or one that is damaged.
    """
    loaded = read_recipe(directory)
    keys, missing = Keys(loaded), list[str]()
    stages = read_stages(keys, directory, missing)
    results, split, digest = read_rows(keys, missing)
    speeds = read_speeds(directory, {row.label: row.path for row in results}, missing)
    layers_of, layers = read_layers(keys, stages, reporter)
    metric = str(loaded.recipe.task.metric)
    known = list(dict.fromkeys(name for row in results for name in row.metrics))
    return Run(
        directory=directory,
        loaded=loaded,
        metric=metric if metric in known else next(iter(known), metric),
        split=split,
        data_digest=digest,
        stages=stages,
        results=results,
        speeds=speeds,
        layers=layers,
        layers_of=layers_of,
        activations=read_activations(keys, stages, missing),
        gates=read_gates(keys, stages),
        lints=read_lints(results, reporter),
        record=read_json_object(directory / RUN_RECORD),
        missing=missing,
    )


def read_recipe(directory: Path) -> LoadedRecipe:
    """The recipe as the newest stage keeps it, in this folder whatever the recipe calls it.

    Raises:
        SqatError: no stage is there.
    """
    newest = newest_stage(directory)
    loaded = load_recipe(newest / RECIPE, load_manifest(newest).overrides)
    whole = directory.resolve()
    recipe = loaded.recipe.model_copy(update={"output": str(whole.parent), "name": whole.name})
    return loaded.model_copy(update={"recipe": recipe})


def read_stages(keys: Keys, directory: Path, missing: list[str]) -> list[Stage]:
    """Every stage of the recipe with its curves."""
    log = directory / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    if not lines:
        missing.append(f"losses on the way: the folder has no {LOG}, so only those of the last step are shown")
    stages = []
    for name, config in keys.loaded.recipe.stages.items():
        manifest = keys.manifest(name)
        if manifest is None:
            missing.append(f"stage {name}: has not run")
        fitted = manifest is not None and manifest.steps > 0
        curves = curves_of(manifest, config, lines) if manifest is not None and fitted else None
        stages.append(Stage(name, config, manifest, curves))
    return stages


def read_rows(keys: Keys, missing: list[str]) -> tuple[list[Result], str, str]:
    """The closing table with its split and data digest."""
    found = read_json_object(keys.loaded.run_directory / FILE)
    remembered = {label: entry for label, entry in found.items() if isinstance(entry, dict)}
    rows = []
    for label, (stage, path) in result_artifacts(keys).items():
        known, manifest = remembered.get(label, {}), keys.manifest(stage)
        if not known:
            missing.append(f"result {label}: not measured (sqat run measures it)")
        metrics = read_metrics(known)
        if known and not metrics:
            missing.append(f"result {label}: {FILE} has no figures that can be read; delete it and run sqat run again")
        stale = bool(known) and (manifest is None or not str(known.get("key", "")).startswith(manifest.sha256))
        if stale:
            missing.append(f"result {label}: measured on an earlier file than the one in the folder")
        rows.append(Result(label, stage, path, metrics, artifact_size(path) or None, stale))
    first: dict[str, Any] = next(iter(remembered.values()), {})
    return rows, str(first.get("split", "")), str(first.get("data", ""))


def read_metrics(known: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one entry; none where they are damaged."""
    try:
        return {str(name): float(value) for name, value in known["metrics"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        return {}


def read_layers(keys: Keys, stages: list[Stage], reporter: Reporter) -> tuple[str, list[LayerRow]]:
    """Name and layers of the last stage that pruned or quantized, or without one of the last that has weights."""
    done = [stage for stage in stages if stage.manifest is not None and stage.config.type != "export"]
    treated = [stage for stage in done if stage.manifest is not None and stage.manifest.layers]
    if not done:
        return "", []
    chosen = (treated or done)[-1].name
    reporter.info(f"reading the layers of {chosen}")
    return chosen, inspect_checkpoint(keys.directory(chosen))


def read_activations(keys: Keys, stages: list[Stage], missing: list[str]) -> list[Activation]:
    """What the last calibrate stage saw, site by site."""
    done = [stage for stage in stages if stage.manifest is not None and stage.config.type == "calibrate"]
    if not done or done[-1].manifest is None:
        return []
    stage, manifest = done[-1].name, done[-1].manifest
    if HISTOGRAMS not in manifest.files:
        missing.append(f"activations: stage {stage} was calibrated by an older sqat, which kept no histograms")
        return []
    checkpoint = load_checkpoint(keys.directory(stage))
    found: dict[str, Any] = json.loads(checkpoint.files[HISTOGRAMS])
    bounds = {site: float(checkpoint.amax[manifest.sites[site].shared_with]) for site in found}
    if not any("covers" in each for each in found.values()):
        missing.append(f"bounds of 99.99 %: stage {stage} was calibrated by an older sqat, which did not keep them")
    return [Activation(site, bounds[site], float(each["width"]), [*each["counts"]], manifest.sites[site].saturated,
                       each.get("covers")) for site, each in found.items()]  # fmt: skip


def read_gates(keys: Keys, stages: list[Stage]) -> list[str]:
    """Each stage's gates in words, and whether what lies in its folder keeps them."""
    return [f"{stage.name} ({'; '.join(show_limits(keys, stage.name))}): {judged(keys, stage)}"
            for stage in stages if stage.config.gates]  # fmt: skip


def judged(keys: Keys, stage: Stage) -> str:
    """Whether a stage keeps its gates, or why that cannot be said."""
    if stage.manifest is None:
        return "not judged, since it has not run"
    try:
        limits = limits_of(keys, stage.name, keys.manifest(keys.loaded.recipe.parent_of(stage.name)))
    except SqatError as error:
        return f"not judged: {error.problem}"
    miss = missed(limits, stage.manifest.metrics)
    return f"misses it: {miss}" if miss else "kept"


def read_lints(results: list[Result], reporter: Reporter) -> list[Linted]:
    """Every exported ONNX file of the results, each once."""
    files = {row.path: row.label for row in reversed(results) if row.path.suffix == ".onnx" and row.path.is_file()}
    found = []
    for path, label in reversed(files.items()):
        reporter.info(f"linting {path.parent.name}/{path.name}")
        found.append(lint_one(label, path))
    return found


def lint_one(label: str, path: Path) -> Linted:
    """One file."""
    target = next((name for name, target in TARGETS.items() if target.file == path.name), "")
    shown = f"{path.parent.name}/{path.name}"
    if target not in LINT_TARGETS:
        return Linted(label, shown, target or "unknown", None, "the linter has no rules for this target")
    try:
        return Linted(label, shown, target, lint_file(path, parse_target(target)))
    except SqatError as error:
        return Linted(label, shown, target, None, error.problem)
