"""The closing table: every result of a recipe measured once on the test split, and remembered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

from sqat.checkpoint.atomic_write import read_json_object, replace_file
from sqat.data.rows import SplitName
from sqat.data.sources import split_digest
from sqat.distributed import broadcast_from_rank0, run_on_rank0
from sqat.evaluation.evaluate import evaluate_artifact
from sqat.pipeline.fingerprint import Keys
from sqat.pipeline.result_files import FILE, artifact_size, result_artifacts
from sqat.progress import Reporter
from sqat.tasks.splits import Splits


@dataclass(frozen=True)
class ResultRow:
    """One line of the closing table."""

    label: str
    stage: str
    metrics: dict[str, float]
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class Results:
    """The closing table: what was measured, on which split of which data."""

    rows: list[ResultRow]
    split: str
    data_digest: str
    directory: Path


def closing_table(keys: Keys, splits: Splits, reporter: Reporter) -> Results:
    """Measure what this recipe has made on the test split (dev where there is none), each file once."""
    loaded = keys.loaded
    recipe, directory = loaded.recipe, loaded.run_directory
    split: SplitName = "test" if recipe.data.test is not None else "dev"
    content = split_digest(getattr(recipe.data, split), loaded.path.parent)
    remembered = json.loads(broadcast_from_rank0(json.dumps(read_json_object(directory / FILE))))
    rows, record = [], {}
    for label, (stage, artifact) in result_artifacts(keys).items():
        manifest = keys.manifest(stage)
        if manifest is None or not keys.is_current(stage):
            reporter.info(f"{label}: left out of the table, since {stage} has not run with this recipe")
            continue
        key = f"{manifest.sha256}/{artifact.name}/{content}"
        known = remembered.get(label, {})
        if known.get("key") != key:
            reporter.info(f"{label}: measuring on {split}")
            known = {"metrics": evaluate_artifact(artifact, splits, split)}
        metrics = {name: float(value) for name, value in known["metrics"].items()}
        row = ResultRow(label, stage, metrics, artifact_size(artifact), artifact)
        rows.append(row)
        figures = {name: value if isfinite(value) else str(value) for name, value in metrics.items()}
        record[label] = {"key": key, "split": split, "data": content, "size_bytes": row.size_bytes,
                         "path": str(artifact), "metrics": figures}  # fmt: skip
    if record:
        run_on_rank0(partial(replace_file, directory / FILE, (json.dumps(record, indent=2) + "\n").encode()))
    return Results(rows, split, content, directory)
