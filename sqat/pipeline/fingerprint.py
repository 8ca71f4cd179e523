"""What a stage's result depends on: its fingerprint by the recipe, and the checkpoints of its inputs.

Two runs of one recipe give the same fingerprint. So a manifest also holds the digests of the parent's and the
teacher's manifests; a checkpoint is current only if both are what lies there now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from sqat.checkpoint.manifest import FORMAT, Manifest, content_digest
from sqat.data.sources import split_digest
from sqat.models.sources import source_digest
from sqat.recipe.inputs import ModelConfig, SplitConfig
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import StageConfig, distill_config
from sqat.recipe.tasks import TASKS

# Raise a number where the same settings and inputs give another result than before.
ALGORITHM_VERSIONS = {"train": 2, "prune": 4, "reconstruct": 1, "calibrate": 3, "qat": 3, "export": 4}
# Settings that change how a stage runs, not its result.
NOT_FINGERPRINTED = {"parent", "save_every", "gates", "retry"}


def shared_inputs(loaded: LoadedRecipe) -> dict[str, object]:
    """Return what every stage of a recipe depends on; this reads the model's files and the data.

    Raises:
        SqatError: a file is missing, or the hub cannot be reached.
    """
    recipe, folder = loaded.recipe, loaded.path.parent
    images = recipe.data.columns.image if "image" in TASKS[recipe.task.name].columns else None
    augment = recipe.data.augment
    return {
        "format": FORMAT,
        "model": recipe.model.model_dump(mode="json"),
        "source": source_digest(recipe.model, folder),
        "task": recipe.task.model_dump(mode="json"),
        "columns": recipe.data.columns.model_dump(mode="json"),
        "data": [split_digest(split, folder, images) for split in (recipe.data.train, recipe.data.dev)],
        "augment": None if augment is None else augment.model_dump(mode="json"),
        "seed": recipe.seed,
    }


def outside_teacher_digest(config: StageConfig, folder: Path) -> str:
    """Return the digest of the files of a teacher that is no stage; empty without one, or where train has its column.

    Raises:
        SqatError: a file is missing.
    """
    distill = distill_config(config)
    teacher = None if distill is None else distill.teacher
    if teacher is None:
        return ""
    if teacher.file is not None:
        return split_digest(SplitConfig(path=teacher.file), folder)
    if teacher.source is None:
        return ""
    return source_digest(ModelConfig(source=teacher.source), folder, "distill.teacher.source")


def fingerprint(config: StageConfig, shared: Mapping[str, object], parent: str, teacher: str) -> str:
    """Return the fingerprint of a stage, 16 hexadecimal digits.

    Args:
        shared: `shared_inputs` of the recipe.
        parent, teacher: fingerprints of the checkpoints that it starts from and learns from; empty without one.
    """
    facts = {
        **shared,
        "stage": config.model_dump(mode="json", exclude=NOT_FINGERPRINTED),
        "algorithm": ALGORITHM_VERSIONS[config.type],
        "parent": parent,
        "teacher": teacher,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def input_digests(parent: Manifest | None, teacher: Manifest | None) -> dict[str, str]:
    """Return the digests of what a stage's parent and teacher hold."""
    manifests = {"parent": parent, "teacher": teacher}
    return {role: content_digest(manifest) for role, manifest in manifests.items() if manifest is not None}


def is_possible_attempt(manifest: Manifest, config: StageConfig) -> bool:
    """Tell whether the stage may make this attempt with as many steps; ``retry`` is in no fingerprint."""
    if manifest.attempt > config.max_attempts:
        return False
    return manifest.retry_multiplier == config.retry_multiplier(manifest.attempt)
