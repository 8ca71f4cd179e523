"""The rows of a recipe: read and checked by its task, prepared once for all stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sqat.data.batch import Processor
from sqat.data.rows import Rows, SplitName, column, rows_of
from sqat.data.sources import describe_split, read_split, split_place
from sqat.data.streaming import Stream, stream_split
from sqat.data.text_files import Placed
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.schema import Recipe
from sqat.recipe.stages import RowGrouping
from sqat.recipe.tasks import TaskSettings
from sqat.tasks.task import Task, build_task, group_rows, task_module


def load_rows(split: SplitConfig, name: SplitName, columns: Columns, settings: TaskSettings, folder: Path) -> Rows:
    """Read and check one split.

    Args:
        name: which split it is; train must hold something to learn, the others something to measure.
        folder: that relative paths start from, the recipe's.

    Raises:
        SqatError: at the first bad row, with its place.
    """
    place, module = split_place(split, name), task_module(settings)
    source, images = read_split(split, name, folder)
    rows = rows_of(module.read_records(source, columns, settings, split.limit, images))
    if len(rows) == 0:
        raise SqatError("no rows", "the split must hold at least one", place, code="no-rows")
    module.check_rows(rows, name, settings, place)
    return rows


def open_stream(split: SplitConfig, columns: Columns, settings: TaskSettings, folder: Path, seed: int) -> Stream:
    """Find the shards of a train split, to be read while a model trains; errors as of `stream_split`."""
    module = task_module(settings)

    def check(source: Iterator[Placed]) -> Rows:
        return rows_of(module.read_records(source, columns, settings, None, None))

    return stream_split(split, folder, seed, check)


@dataclass
class Splits:
    """The rows of a recipe, read and prepared once for all its stages.

    ``remarks`` say how files were read, where that is not evident.
    Of a streamed train split, ``rows`` and ``prepared`` are its buffer as it is first filled.

    Attributes:
        limit: rows of each split that ``prepared`` gives; None for all.
    """

    recipe: Recipe
    folder: Path
    raw: dict[str, Rows] = field(default_factory=dict)
    encoded: dict[str, Rows] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    sizes: dict[RowGrouping, tuple[int, int]] = field(default_factory=dict)
    limit: int | None = None

    def first_rows(self, limit: int) -> Splits:
        """Return the same rows and the same task, but `prepared` gives a few rows of each split."""
        task = self.task  # reads the train rows, which both then hold
        few = replace(self, encoded={}, limit=limit)
        few.task, few.stream = task, None
        return few

    def rows(self, name: SplitName) -> Rows:
        """Return the checked rows of a split."""
        if name not in self.raw:
            config = getattr(self.recipe.data, name)
            if config is None:
                raise SqatError(f"the recipe has no data.{name}", f"add data.{name} or choose another split",
                                code="unknown-name")  # fmt: skip
            self.remarks += describe_split(config, name, self.folder)
            if name == "train" and self.stream is not None:
                self.raw[name] = self.stream.read(0, 0, self.stream.buffer)
            else:
                self.raw[name] = load_rows(config, name, self.recipe.data.columns, self.recipe.task, self.folder)
        return self.raw[name]

    def take_few(self, rows: Rows, limit: int) -> Rows:
        """Take the first rows, of a query's passages one for each grade; more, until something can be learned."""
        first = np.arange(len(rows))
        if "group" in rows.column_names:
            grades = np.stack([column(rows, "group"), column(rows, "label")])
            first = np.sort(np.unique(grades, axis=1, return_index=True)[1])
        count = limit
        while True:
            few = rows.select(first[:count])
            if count >= len(first) or self.task.training_groups(few, self.recipe.seed, 0):
                return few
            count *= 2

    @cached_property
    def stream(self) -> Stream | None:
        """The stream of the train split; None where it is not streamed."""
        recipe, split = self.recipe, self.recipe.data.train
        if not split.streaming:
            return None
        return open_stream(split, recipe.data.columns, recipe.task, self.folder, recipe.seed)

    def epoch_sizes(self, grouping: RowGrouping) -> tuple[int, int]:
        """Return the number of train rows of an epoch, and of those in its largest group."""
        if self.stream is not None:
            return self.stream.rows, 1
        if grouping not in self.sizes:
            rows = self.task.encode(self.rows("train"))
            sizes = [*map(len, group_rows(self.task, grouping, rows, self.recipe.seed, 0))]
            self.sizes[grouping] = sum(sizes), max(sizes, default=0)
        return self.sizes[grouping]

    @cached_property
    def task(self) -> Task:
        """The task, with the classes and grades of the train rows."""
        return build_task(self.recipe.task, self.rows("train"))

    def check(self) -> None:
        """Read every split, and refuse what a stage would refuse hours later.

        Raises:
            SqatError: a row is wrong, or dev or test has a class that train lacks.
        """
        names: tuple[SplitName, ...] = ("train", "dev", "test")
        for name in names:
            if getattr(self.recipe.data, name) is not None:
                self.task.encode(self.rows(name))

    def prepared(self, name: SplitName, processor: Processor) -> Rows:
        """Return the rows of a split as the model reads them: all of train, of dev and test those that are measured.

        Every stage of a recipe has the same processor.
        """
        if name not in self.encoded:
            rows = self.task.encode(self.rows(name))
            rows = rows if name == "train" else self.task.evaluation_rows(rows)
            if self.limit is not None:
                rows = self.take_few(rows, self.limit)
            self.encoded[name] = processor.prepare(rows, self.recipe.model.max_length)
        return self.encoded[name]
