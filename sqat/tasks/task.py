"""What stages and the training loop ask of a task, and what a task's module holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.rows import Record, Rows, SplitName
from sqat.data.text_files import Placed
from sqat.distillation import OutputLossName
from sqat.recipe.inputs import Columns
from sqat.recipe.stages import RowGrouping
from sqat.recipe.tasks import TASKS, TaskSettings
from sqat.tasks.metrics import UnitMetrics

TIE = 0.01


class Task(ABC):
    """Loss and metrics of a task; N rows, B rows of a batch, C outputs.

    Attributes:
        output_losses: how its outputs may be distilled, from its `TaskSpec`; the first is the default.
    """

    output_losses: ClassVar[tuple[OutputLossName, ...]]

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Kind of model that the task is for, a key of `sqat.models.architectures`."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric that selects the best step; more is better."""

    @property
    def outputs(self) -> int:
        """Outputs of the head, C; 0 where the model has no head."""
        return 0

    @property
    def config_fields(self) -> dict[str, Any]:
        """Entries of the model's config: id2label, label2id, problem_type."""
        return {}

    def encode(self, rows: Rows) -> Rows:
        """Return rows with numeric labels."""
        return rows

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Return the rows of one epoch, in groups that must share a batch."""
        return [[row] for row in range(len(rows))]

    def query_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Return the rows of one epoch a query's together whatever their labels; without queries, alone."""
        return [[row] for row in range(len(rows))]

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Return the rows of dev or test that a metric depends on; the others are not computed."""
        return rows

    def data_warnings(self, rows: Rows) -> list[str]:
        """Return what `training_groups` leaves out of the train rows, a line each."""
        return []

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss [] of outputs [B, C]."""

    @abstractmethod
    def unit_metrics(self, logits: Tensor, rows: Rows) -> UnitMetrics:
        """Return the metrics of outputs [N, C], in the order of the rows, as a function of queries or rows."""

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        """Return the metrics of outputs [N, C], in the order of the rows."""
        return self.unit_metrics(logits, rows).values()

    @abstractmethod
    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return for each decision whether two outputs [N, C] of one model lead to the same one, bool."""


class TaskModule(Protocol):
    """The module that a `TaskSpec` names."""

    def read_records(
        self, source: Iterator[Placed], columns: Columns, settings: Any, limit: int | None, folder: Path | None
    ) -> Iterator[Record]:
        """Yield the checked records of a split's rows.

        Args:
            limit: rows (queries, where rows belong to queries) to keep.
            folder: whose image files the rows may name; None where they may name none.

        Raises:
            SqatError: at the first bad row, with its place.
        """

    def check_rows(self, rows: Rows, split: SplitName, settings: Any, place: str) -> None:
        """Refuse a split that nothing can be learned from (train) or measured on (dev, test)."""

    def build(self, settings: Any, train_rows: Rows) -> Task:
        """Make the task."""


def task_module(settings: TaskSettings) -> TaskModule:
    """Import the module of the task that a recipe names."""
    return cast("TaskModule", import_module(TASKS[settings.name].module))


def build_task(settings: TaskSettings, train_rows: Rows) -> Task:
    """Make the task of a recipe; classes and the highest grade come from the train rows.

    Raises:
        SqatError: the labels of the recipe and of the rows do not fit.
    """
    return task_module(settings).build(settings, train_rows)


def group_rows(task: Task, grouping: RowGrouping, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of one epoch, in groups that must share a batch."""
    if grouping == "rows":
        return [[row] for row in range(len(rows))]
    return (task.query_groups if grouping == "queries" else task.training_groups)(rows, seed, epoch)


def tie_margin(reference: Tensor) -> float:
    """Return a hundredth of the standard deviation of the reference's scores.

    Two options nearer than this are a tie: which of them wins is rounding, not meaning.
    """
    return TIE * float(reference.double().std(unbiased=False))
