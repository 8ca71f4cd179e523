"""The stage tree of a recipe, resolved once: each stage with its parent, teacher, folder, fingerprint and manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

from sqat.checkpoint.manifest import Manifest, load_manifest
from sqat.errors import SqatError
from sqat.pipeline.fingerprint import (
    fingerprint,
    input_digests,
    is_possible_attempt,
    outside_teacher_digest,
    shared_inputs,
)
from sqat.recipe.schema import LoadedRecipe
from sqat.recipe.selection import stage_range
from sqat.recipe.stages import StageConfig, distill_config


@dataclass(eq=False)
class StageNode:
    """One stage of a recipe.

    Attributes:
        parent: stage that it starts from; None for the pretrained model.
        teacher: stage that teaches it; None where it does not distil.
        directory: folder of its checkpoint, whether it has run or not.
        manifest: of that checkpoint; None where there is no valid one.
        read_inputs: what all stages of the recipe depend on, read at the first call.
        folder: the recipe's.
    """

    name: str
    config: StageConfig
    parent: StageNode | None
    teacher: StageNode | None
    directory: Path
    manifest: Manifest | None
    read_inputs: Callable[[], Mapping[str, object]] = field(repr=False)
    folder: Path = field(default=Path(), repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint that this recipe makes."""
        parent = self.parent.fingerprint if self.parent else ""
        return self.fingerprint_after(parent, self.teacher.fingerprint if self.teacher else "")

    def fingerprint_after(self, parent: str, teacher: str) -> str:
        """Return the fingerprint after a parent and a teacher of the given fingerprints."""
        return fingerprint(self.config, self.read_inputs(), parent, teacher + self.outside_digest)

    @cached_property
    def outside_digest(self) -> str:
        """Digest of the files of a teacher that is no stage; empty without one."""
        return outside_teacher_digest(self.config, self.folder)

    @property
    def teacher_label(self) -> str | None:
        """What teaches the stage, in words; None where it does not distil."""
        distill = distill_config(self.config)
        if distill is not None and distill.teacher is not None:
            return distill.teacher.label
        return self.teacher.name if self.teacher else None

    @property
    def parent_manifest(self) -> Manifest | None:
        """Manifest of the parent's checkpoint."""
        return self.parent.manifest if self.parent else None

    @property
    def teacher_manifest(self) -> Manifest | None:
        """Manifest of the teacher's checkpoint."""
        return self.teacher.manifest if self.teacher else None

    @property
    def is_current(self) -> bool:
        """Whether the checkpoint is what this recipe makes from the parent and teacher that lie there now."""
        manifest = self.manifest
        if (
            manifest is None
            or manifest.fingerprint != self.fingerprint
            or not is_possible_attempt(manifest, self.config)
        ):
            return False
        return manifest.input_digests == input_digests(self.parent_manifest, self.teacher_manifest)

    def reload(self) -> None:
        """Read the manifest again, after the stage has run."""
        self.manifest = try_load_manifest(self.directory)


@dataclass(frozen=True)
class StageGraph:
    """All stages of a recipe, by name and in order."""

    loaded: LoadedRecipe
    nodes: dict[str, StageNode]

    def select(self, first: str | None, last: str | None) -> list[StageNode]:
        """Return the stages from ``first`` to ``last``."""
        return [self.nodes[name] for name in stage_range(self.loaded.recipe, first, last)]

    @property
    def leaves(self) -> list[StageNode]:
        """Stages from which no other starts."""
        parents = {node.parent for node in self.nodes.values()}
        return [node for node in self.nodes.values() if node not in parents]


def resolve_graph(loaded: LoadedRecipe) -> StageGraph:
    """Resolve the stages of a recipe and read the manifests that are there."""
    recipe, nodes = loaded.recipe, dict[str, StageNode]()
    read_inputs = cache(partial(shared_inputs, loaded))
    for name, config in recipe.stages.items():
        parent, teacher = recipe.parent_of(name), recipe.teacher_of(name)
        directory = stage_directory(loaded, name)
        nodes[name] = StageNode(
            name=name,
            config=config,
            parent=nodes[parent] if parent else None,
            teacher=nodes[teacher] if teacher else None,
            directory=directory,
            manifest=try_load_manifest(directory),
            read_inputs=read_inputs,
            folder=loaded.path.parent,
        )
    return StageGraph(loaded, nodes)


def stage_directory(loaded: LoadedRecipe, name: str) -> Path:
    """Return the folder of a stage's checkpoint: its number and name in the run folder."""
    number = list(loaded.recipe.stages).index(name) + 1
    return loaded.run_directory / f"{number:02d}-{name}"


def try_load_manifest(directory: Path) -> Manifest | None:
    """Load the manifest of the checkpoint in a folder; None where there is no valid one, or the folder is a link."""
    if directory.is_symlink():
        return None
    try:
        return load_manifest(directory)
    except SqatError:
        return None
