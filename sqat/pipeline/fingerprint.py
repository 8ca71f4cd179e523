"""What a stage's result depends on: its key by the recipe, and the very checkpoints it was made from.

The key digests the stage's own section, the model's files, the task, the data's content, the seed, sqat's version
and the parent's and teacher's keys. Two runs of one recipe give one key, so a manifest also names the digests of
the parent's and the teacher's manifests: a stage is unchanged only if both the key and these are what lies there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sqat
from sqat.checkpoint.manifest import FORMAT, Manifest, load_manifest
from sqat.data.sources import split_digest
from sqat.errors import SqatError
from sqat.models.sources import source_digest
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.stages import StageConfig
from sqat.recipe.tasks import TASKS

# Entries of a section that change how a stage runs, not what comes out of it.
UNKEYED = {"parent", "save_every", "gates", "retry"}


def known_manifest(directory: Path) -> Manifest | None:
    """Manifest of the checkpoint in a folder; None where there is no sound one."""
    try:
        return load_manifest(directory)
    except SqatError:
        return None


@dataclass(frozen=True)
class Keys:
    """Keys and folders of a recipe's stages; the files they depend on are read once."""

    loaded: LoadedRecipe

    def directory(self, name: str) -> Path:
        """Where a stage's checkpoint lies."""
        number = list(self.loaded.recipe.stages).index(name) + 1
        return self.loaded.run_directory / f"{number:02d}-{name}"

    def manifest(self, name: str | None) -> Manifest | None:
        """The manifest of a stage's checkpoint, where there is one."""
        return None if name is None else known_manifest(self.directory(name))

    @cached_property
    def common(self) -> dict[str, object]:
        """What every stage depends on."""
        recipe, folder = self.loaded.recipe, self.loaded.path.parent
        images = recipe.data.columns.image if "image" in TASKS[recipe.task.name].columns else None
        return {
            "format": FORMAT,
            "sqat": sqat.__version__,
            "model": recipe.model.model_dump(mode="json"),
            "source": source_digest(recipe.model, folder),
            "task": recipe.task.model_dump(mode="json"),
            "columns": recipe.data.columns.model_dump(mode="json"),
            "data": [split_digest(split, folder, images) for split in (recipe.data.train, recipe.data.dev)],
            "augment": None if recipe.data.augment is None else recipe.data.augment.model_dump(mode="json"),
            "seed": recipe.seed,
        }

    def after(self, name: str, parent: str, teacher: str) -> str:
        """Key of a stage after a parent and a teacher of the given keys."""
        section = self.loaded.recipe.stages[name].model_dump(mode="json", exclude=UNKEYED)
        facts = {**self.common, "stage": section, "parent": parent, "teacher": teacher}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def planned(self) -> dict[str, str]:
        """Key of every stage as the recipe stands."""
        keys: dict[str, str] = {}
        for name in self.loaded.recipe.stages:
            parent, teacher = self.loaded.recipe.parent_of(name), self.loaded.recipe.teacher_of(name)
            keys[name] = self.after(name, keys.get(parent or "", ""), keys.get(teacher or "", ""))
        return keys

    def is_current(self, name: str) -> bool:
        """A stage's checkpoint is what this recipe makes from the checkpoints that lie there now."""
        manifest = self.manifest(name)
        recipe = self.loaded.recipe
        if manifest is None or manifest.key != self.planned[name] or not is_attempt(manifest, recipe.stages[name]):
            return False
        parent, teacher = self.manifest(recipe.parent_of(name)), self.manifest(recipe.teacher_of(name))
        return manifest.input_digests == made_from(parent, teacher)


def is_attempt(manifest: Manifest, config: StageConfig) -> bool:
    """A checkpoint is of an attempt that the stage may make, with as many steps: ``retry`` is in no key."""
    return manifest.attempt <= config.max_attempts and manifest.retry_multiplier == config.retry_multiplier(
        manifest.attempt
    )


def made_from(parent: Manifest | None, teacher: Manifest | None) -> dict[str, str]:
    """Digests of the manifests of a stage's parent and teacher."""
    both = {"parent": parent, "teacher": teacher}
    return {role: manifest.sha256 for role, manifest in both.items() if manifest is not None}
