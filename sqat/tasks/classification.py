"""Classification of one or two texts: a softmax over the classes, cross-entropy.

Classes are texts; a whole number in the data is its digits. Without a list in the recipe they are those of the train
rows, sorted as numbers where all are numbers, else as texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.fields import check_two_labels, class_name, class_of, read_texts, similar_labels
from sqat.data.rows import Record, Rows, SplitName, column
from sqat.data.text_files import Placed
from sqat.data.wording import listed, shorten
from sqat.errors import SqatError, nearest
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks.classification import CLASSIFICATION, ClassificationTask
from sqat.tasks import metrics
from sqat.tasks.task import Task, tie_margin


@dataclass(frozen=True)
class Classification(Task):
    """Choose one of ``labels``."""

    labels: tuple[str, ...]
    metric: Literal["accuracy", "f1"] = "accuracy"
    architecture: str = "texts"
    output_losses: ClassVar = CLASSIFICATION.output_losses

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def config_fields(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def encode(self, rows: Rows) -> Rows:
        """Replace each class by its number, int64.

        Raises:
            SqatError: a row has a class that is not among the labels.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        names = list(rows["label"])
        unknown = next((row for row, name in enumerate(names) if name not in numbers), None)
        if unknown is not None:
            near = nearest(names[unknown], self.labels)
            hint = f'did you mean "{near}"?' if near else f"train has {listed(self.labels)}"
            raise SqatError(
                f'unknown class "{shorten(names[unknown])}"', hint, rows[unknown]["place"], code="invalid-data"
            )
        return rows.remove_columns("label").add_column("label", [numbers[name] for name in names])

    def data_warnings(self, rows: Rows) -> list[str]:
        return similar_labels(self.labels)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), batch.labels)

    def unit_metrics(self, logits: Tensor, rows: Rows) -> metrics.UnitMetrics:
        metrics.finite(logits)
        return metrics.classification(column(rows, "label"), logits.argmax(dim=1))

    def same_decision(self, reference: Tensor, other: Tensor, rows: Rows) -> Tensor:
        """Return bool [N]: the same class, or one whose score in the reference is within the `tie_margin`."""
        chosen = reference.gather(1, other.argmax(dim=1)[:, None]).squeeze(1)
        return reference.amax(dim=1) - chosen <= tie_margin(reference)


def read_records(
    source: Iterator[Placed], columns: Columns, settings: ClassificationTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield texts with a class."""
    return islice(read_texts(source, columns, class_of), limit)


def check_rows(rows: Rows, split: SplitName, settings: ClassificationTask, place: str) -> None:
    """Refuse a train split of one class."""
    if split == "train":
        check_two_labels(rows, split, place, "class")


def build(settings: ClassificationTask, train_rows: Rows, architecture: str = "texts") -> Classification:
    """Make the task; the classes are the recipe's, or those of the train rows.

    Raises:
        SqatError: fewer than two classes, or one of them twice.
    """
    given = tuple(class_name(label) or label for label in settings.labels or ())
    labels = given or sort_labels(set(train_rows["label"]))
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise SqatError(f"task.labels is {listed(list(labels))}", "give at least two, each once",
                        code="invalid-recipe")  # fmt: skip
    return Classification(labels, settings.metric, architecture)


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Sort labels as numbers where every label is one ("10" after "9"), as texts otherwise."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))
