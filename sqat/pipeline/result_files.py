"""Where the results of a recipe lie, and how large they are."""

from __future__ import annotations

from pathlib import Path

from sqat.pipeline.graph import StageGraph, StageNode
from sqat.recipe.targets import TARGETS

LOG_FILE = "sqat.log"  # in the run folder
RESULTS_FILE = "results.json"  # in the run folder: what the results table remembers
REHEARSED_FILE = "rehearsed.json"  # in the run folder: fingerprints of the stages that were rehearsed


def result_artifacts(graph: StageGraph) -> dict[str, tuple[StageNode, Path]]:
    """Return label -> stage and its checkpoint folder or exported file, for the recipe's rows or every last stage."""
    rows = graph.loaded.recipe.results or {node.name: node.name for node in graph.leaves}
    artifacts: dict[str, tuple[StageNode, Path]] = {}
    for label, row in rows.items():
        name, _, chosen = row.partition("/")
        node = graph.nodes[name]
        if node.config.type != "export":
            artifacts[label] = (node, node.directory)
            continue
        targets = (chosen,) if chosen else node.config.targets
        for target in targets:
            target_label = label if len(targets) == 1 else f"{label} {target}"
            artifacts[target_label] = (node, node.directory / TARGETS[target].file)
    return artifacts


def artifact_size(artifact: Path) -> int:
    """Return the bytes of an exported file, or of a checkpoint's tensors."""
    files = [artifact] if artifact.is_file() else artifact.glob("*.safetensors")
    return sum(file.stat().st_size for file in files if file.is_file())
