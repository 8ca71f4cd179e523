"""The closing table: every result of a recipe measured once on the test split, and remembered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

from sqat.data import SplitName, digest
from sqat.display import Display
from sqat.evaluation import evaluate_artifact
from sqat.job import Splits
from sqat.keys import Keys
from sqat.processes import by_first, first_says
from sqat.small_files import read_object, replace_file
from sqat.stages.targets import file_name

FILE = "results.json"


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


def closing_table(keys: Keys, splits: Splits, display: Display) -> Results:
    """Measure what this recipe has made on the test split (dev where there is none), each file once."""
    loaded = keys.loaded
    recipe, directory = loaded.recipe, loaded.run_directory
    split: SplitName = "test" if recipe.data.test is not None else "dev"
    content = digest(getattr(recipe.data, split), loaded.path.parent)
    remembered = json.loads(first_says(json.dumps(read_object(directory / FILE))))
    rows, record = [], {}
    for label, (stage, artifact) in result_artifacts(keys).items():
        manifest = keys.manifest(stage)
        if manifest is None or not keys.is_current(stage):
            display.say(f"{label}: left out of the table, since {stage} has not run with this recipe")
            continue
        key = f"{manifest.sha256}/{artifact.name}/{content}"
        known = remembered.get(label, {})
        if known.get("key") != key:
            display.say(f"{label}: measuring on {split}")
            known = {"metrics": evaluate_artifact(artifact, splits, split)}
        metrics = {name: float(value) for name, value in known["metrics"].items()}
        row = ResultRow(label, stage, metrics, artifact_size(artifact), artifact)
        rows.append(row)
        figures = {name: value if isfinite(value) else str(value) for name, value in metrics.items()}
        record[label] = {"key": key, "split": split, "data": content, "size_bytes": row.size_bytes,
                         "path": str(artifact), "metrics": figures}  # fmt: skip
    if record:
        by_first(partial(replace_file, directory / FILE, (json.dumps(record, indent=2) + "\n").encode()))
    return Results(rows, split, content, directory)


def result_artifacts(keys: Keys) -> dict[str, tuple[str, Path]]:
    """Label -> stage and its checkpoint folder or ONNX file; the recipe's rows, or every last stage."""
    recipe = keys.loaded.recipe
    parents = {recipe.parent_of(name) for name in recipe.stages}
    wanted = recipe.results or {name: name for name in recipe.stages if name not in parents}
    found: dict[str, tuple[str, Path]] = {}
    for label, row in wanted.items():
        name, _, target = row.partition("/")
        directory, config = keys.directory(name), recipe.stages[name]
        if config.stage != "export":
            found[label] = (name, directory)
            continue
        targets = (target,) if target else config.targets
        for each in targets:
            found[label if len(targets) == 1 else f"{label} {each}"] = (name, directory / file_name(each))
    return found


def artifact_size(artifact: Path) -> int:
    """Bytes of an ONNX file, or of a checkpoint's tensors."""
    files = [artifact] if artifact.is_file() else artifact.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
