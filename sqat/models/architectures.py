"""Kinds of models: how each is built from a source or from a checkpoint's files.

Every model returns an object with ``.logits``, a tensor [B, ...]; where the library's own does not, a forward hook
makes one. Another kind is one file here and one line in the table.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from torch import nn

from sqat.data.batch import Processor
from sqat.models.diffusion import Diffusion
from sqat.models.head import TaskHead
from sqat.models.image import Images
from sqat.models.sentence import Sentences
from sqat.models.text import Texts
from sqat.recipe.inputs import ModelConfig


class Architecture(Protocol):
    """One kind of model."""

    @property
    def output(self) -> str:
        """Name of the output of an ONNX file."""

    def claims(self, files: Collection[str]) -> bool:
        """Whether a checkpoint with files of these names is of this kind; the first that claims it has it."""

    def pretrained(self, config: ModelConfig, source: str, head: TaskHead) -> tuple[nn.Module, Processor]:
        """The model to start from, and its processor.

        Args:
            source: folder or hub name; empty where the recipe gives ``model.config``.
            head: what the task needs.
        """

    def model(self, folder: Path) -> nn.Module:
        """A model with random weights, by the config in a folder."""

    def processor(self, folder: Path, place: str) -> Processor:
        """The processor whose files lie in a folder, which errors call ``place``."""


ARCHITECTURES: dict[str, Architecture] = {
    "diffusion": Diffusion(),
    "sentences": Sentences(),
    "images": Images(),
    "texts": Texts(),
}
