"""Tasks: what a head puts out, what it learns from, and how it is measured.

A task is a frozen dataclass made from its recipe section and the train rows; stages and the training loop
know only the protocol below. Another task is one file here, one section in `sqat.recipe.tasks` and one line in
`build_task`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sqat.data.dataset import Batch, Rows
from sqat.recipe.tasks import (
    ClassificationTask,
    QueryPerformanceTask,
    RegressionTask,
    RelevanceTask,
    RetrievalTask,
    TaskSettings,
    TextToImageTask,
)
from sqat.tasks.classification import Classification
from sqat.tasks.performance import QueryPerformance
from sqat.tasks.regression import Regression
from sqat.tasks.relevance import Relevance
from sqat.tasks.retrieval import Retrieval
from sqat.tasks.text_to_image import TextToImage


class Task(Protocol):
    """What the stages ask of a task; N rows, B rows of a batch, C outputs."""

    @property
    def architecture(self) -> str:
        """Kind of model that the task is for, a key of `sqat.models.architectures`."""

    @property
    def metric(self) -> str:
        """The metric that picks the best step; higher is better."""

    @property
    def outputs(self) -> int:
        """Logits of the head, C."""

    @property
    def config_fields(self) -> dict[str, Any]:
        """What the transformers configuration should say: id2label, label2id, problem_type."""

    def encode(self, rows: Rows) -> Rows:
        """Rows with a numeric label."""

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        """Rows of one epoch; those that must share a batch stand together."""

    def evaluation_rows(self, rows: Rows) -> Rows:
        """Rows of dev or test that the metrics look at; the others are not even computed."""

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """How far the student's output [B, ...] is from the teacher's, a scalar."""

    def data_warnings(self, rows: Rows) -> list[str]:
        """What `training_groups` leaves out of the train rows, a line each, for the user."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [] of logits [B, C]."""

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        """Metrics of logits [N, C], in the order of the rows."""

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Whether two forms of one model lead to the same decision: a bool for each thing a user decides on."""


def build_task(settings: TaskSettings, train_rows: Rows) -> Task:
    """Make the task of a recipe; classes and the highest grade come from the train rows.

    Raises:
        SqatError: the labels of the recipe and of the rows do not fit.
    """
    if isinstance(settings, ClassificationTask):
        return Classification.of(settings, train_rows)
    if isinstance(settings, RegressionTask):
        return Regression(metric=settings.metric)
    if isinstance(settings, QueryPerformanceTask):
        return QueryPerformance(settings.loss, settings.metric)
    if isinstance(settings, RetrievalTask):
        return Retrieval.of(settings)
    if isinstance(settings, TextToImageTask):
        return TextToImage(settings.metric)
    assert isinstance(settings, RelevanceTask)
    return Relevance.of(settings, train_rows)
