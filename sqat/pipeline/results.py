"""The results table: every result of a recipe, measured once on the test split and remembered."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from sqat.data.rows import SplitName
from sqat.data.sources import split_digest
from sqat.distributed import broadcast_from_rank0, run_on_rank0
from sqat.evaluation.evaluate import predict_artifact
from sqat.files.read import try_read_object
from sqat.files.replace import replace_file
from sqat.pipeline.bootstrap import DRAWS, Difference, Samples, compare, read_samples, write_samples
from sqat.pipeline.graph import StageGraph
from sqat.pipeline.result_files import RESULTS_FILE, artifact_size, result_artifacts
from sqat.progress import Reporter
from sqat.tasks.splits import Splits


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table; ``difference`` is that to the first row, in the task's own metric."""

    label: str
    stage: str
    metrics: dict[str, float]
    size_bytes: int
    path: Path
    difference: Difference | None = None


@dataclass(frozen=True)
class Results:
    """The results table with its split and data."""

    rows: list[ResultRow]
    split: str
    data_digest: str
    directory: Path


def measure_results(graph: StageGraph, splits: Splits, reporter: Reporter) -> Results:
    """Measure every result that is current on the test split (without one on dev), and remember the figures."""
    loaded = graph.loaded
    data, directory = loaded.recipe.data, loaded.run_directory
    split: SplitName = "test" if data.test is not None else "dev"
    data_digest = split_digest(getattr(data, split), loaded.path.parent)
    known = read_samples(directory)
    entries = try_read_object(directory / RESULTS_FILE)
    remembered = json.loads(broadcast_from_rank0(json.dumps({
        label: entry for label, entry in entries.items() if entry.get("key") in known})))  # fmt: skip
    rows, record = list[ResultRow](), dict[str, dict[str, Any]]()
    samples: dict[str, Samples] = {}
    for label, (node, artifact) in result_artifacts(graph).items():
        if node.manifest is None or not node.is_current:
            reporter.info(f"{label}: skipped: stage {node.name} has not run with this recipe")
            continue
        key = f"{node.manifest.sha256}/{artifact.name}/{data_digest}"
        entry = remembered.get(label, {})
        if entry.get("key") == key:
            samples[key] = known.get(key, {})
        else:
            reporter.info(f"{label}: measuring on {split}")
            outputs = predict_artifact(artifact, splits, split)
            entry = {"metrics": splits.task.metrics(*outputs)}
            samples[key] = splits.task.unit_metrics(*outputs).resample(DRAWS)
        row = ResultRow(label, node.name, read_figures(entry["metrics"]), artifact_size(artifact), artifact)
        rows.append(row)
        record[label] = {
            "key": key,
            "split": split,
            "data": data_digest,
            "size_bytes": row.size_bytes,
            "path": str(artifact),
            "metrics": {name: value if isfinite(value) else str(value) for name, value in row.metrics.items()},
        }
    if record:
        content = json.dumps(record, indent=2) + "\n"
        run_on_rank0(partial(write_samples, directory, samples))
        run_on_rank0(partial(replace_file, directory / RESULTS_FILE, content.encode()))
    rows = compare_rows(rows, [samples[entry["key"]] for entry in record.values()], splits.task.metric)
    return Results(rows, split, data_digest, directory)


def compare_rows(rows: list[ResultRow], samples: list[Samples], metric: str) -> list[ResultRow]:
    """Return rows with their difference to the first one, where both have samples of the metric."""
    compared = rows[:1]
    for row, own in zip(rows[1:], samples[1:], strict=True):
        difference = None
        if metric in own and metric in samples[0]:
            values = row.metrics[metric], rows[0].metrics[metric]
            difference = compare(metric, rows[0].label, values, (own, samples[0]))
        compared.append(replace(row, difference=difference))
    return compared


def read_figures(metrics: dict[str, float | str]) -> dict[str, float]:
    """Read metrics as the file holds them: JSON has no infinity, so it stands there as a text."""
    return {name: float(value) for name, value in metrics.items()}
