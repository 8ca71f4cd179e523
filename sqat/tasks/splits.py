"""The rows of a recipe: read, given their task's labels and prepared once, for all who ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from sqat.data.dataset import Processor, Rows, SplitName, load_rows
from sqat.data.streaming import Stream, open_stream
from sqat.errors import SqatError
from sqat.recipe.schema import Recipe
from sqat.tasks import Task, build_task


@dataclass
class Splits:
    """The rows of a recipe, read and prepared once for all its stages.

    Of a train split that is streamed, ``rows`` and ``prepared`` are its buffer as it is first filled.
    """

    recipe: Recipe
    folder: Path
    raw: dict[str, Rows] = field(default_factory=dict)
    encoded: dict[str, Rows] = field(default_factory=dict)

    def rows(self, name: SplitName) -> Rows:
        """Rows of a split as they were read."""
        if name not in self.raw:
            config = getattr(self.recipe.data, name)
            if config is None:
                raise SqatError(f"the recipe has no data.{name}", f"add data.{name} or choose another split")
            if name == "train" and self.stream is not None:
                self.raw[name] = self.stream.read(0, 0, self.stream.buffer)
            else:
                self.raw[name] = load_rows(config, name, self.recipe.data.columns, self.recipe.task, self.folder)
        return self.raw[name]

    @cached_property
    def stream(self) -> Stream | None:
        """The train split, where it is streamed."""
        recipe, split = self.recipe, self.recipe.data.train
        if not split.streaming:
            return None
        return open_stream(split, recipe.data.columns, recipe.task, self.folder, recipe.seed)

    def epoch_rows(self) -> int:
        """Rows that an epoch of the train split trains on."""
        if self.stream is not None:
            return self.stream.rows
        return sum(map(len, self.task.training_groups(self.task.encode(self.rows("train")), self.recipe.seed, 0)))

    @cached_property
    def task(self) -> Task:
        """The task, with the classes and grades of the train rows."""
        return build_task(self.recipe.task, self.rows("train"))

    def prepared(self, name: SplitName, processor: Processor) -> Rows:
        """Rows of a split with numeric labels, as the model reads them; those of dev and test that are measured.

        Every stage of a recipe has the same processor.
        """
        if name not in self.encoded:
            rows = self.task.encode(self.rows(name))
            rows = rows if name == "train" else self.task.evaluation_rows(rows)
            self.encoded[name] = processor.prepare(rows, self.recipe.model.max_length)
        return self.encoded[name]
