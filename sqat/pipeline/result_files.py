"""Where the results of a recipe lie: what each target's file is called, which files the closing table is about."""

from __future__ import annotations

from pathlib import Path

from sqat.pipeline.fingerprint import Keys
from sqat.recipe.targets import TARGETS

FILE = "results.json"  # in the run folder: what the closing table remembers


def result_artifacts(keys: Keys) -> dict[str, tuple[str, Path]]:
    """Label -> stage and its checkpoint folder or ONNX file; the recipe's rows, or every last stage."""
    recipe = keys.loaded.recipe
    parents = {recipe.parent_of(name) for name in recipe.stages}
    wanted = recipe.results or {name: name for name in recipe.stages if name not in parents}
    found: dict[str, tuple[str, Path]] = {}
    for label, row in wanted.items():
        name, _, target = row.partition("/")
        directory, config = keys.directory(name), recipe.stages[name]
        if config.type != "export":
            found[label] = (name, directory)
            continue
        targets = (target,) if target else config.targets
        for each in targets:
            found[label if len(targets) == 1 else f"{label} {each}"] = (name, directory / TARGETS[each].file)
    return found


def artifact_size(artifact: Path) -> int:
    """Bytes of an ONNX file, or of a checkpoint's tensors."""
    files = [artifact] if artifact.is_file() else artifact.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
