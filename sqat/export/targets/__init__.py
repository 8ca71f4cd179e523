"""The writers of the export targets: one file a target, found by the table in `sqat.recipe.targets`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from sqat.errors import SqatError
from sqat.recipe.targets import TARGETS, unmet_need

if TYPE_CHECKING:
    from sqat.export.source import Source, TargetFile


class TargetModule(Protocol):
    """What the Python module of a target holds.

    Attributes:
        USAGE: Markdown for the model card, with the fields ``{file}``, ``{inputs}``, ``{output}`` and ``{loader}``.
    """

    USAGE: str

    def write(self, source: Source, path: Path) -> TargetFile:
        """Write the target's file or folder at ``path``."""


def load_target(name: str) -> TargetModule:
    """Import the module of a target."""
    return cast(TargetModule, import_module(TARGETS[name].module))


def write_target(name: str, source: Source, folder: Path) -> TargetFile:
    """Write the files of one target into a folder.

    Raises:
        SqatError: the target cannot express this model.
        GateError: what it wrote breaks a rule of its format.
    """
    manifest, config = source.checkpoint.manifest, source.config
    pruned = any(record.pattern for record in manifest.layers.values())
    calibrated = bool(source.checkpoint.amax)
    if need := unmet_need(name, calibrated=calibrated, placement=manifest.placement, pruned=pruned):
        raise SqatError(*need, code="unsupported-target")
    if config.embeddings not in (allowed := TARGETS[name].embeddings):
        raise SqatError(f"target {name} stores word embeddings as {' or '.join(allowed)}, not {config.embeddings}",
                        f"set embeddings: {allowed[-1]}", code="unsupported-target")  # fmt: skip
    return load_target(name).write(source, folder / TARGETS[name].file)
