"""Classification of one or two texts, or of images: a softmax over the classes, cross-entropy.

Classes are texts; a whole number in the data is its digits. Without a list in the recipe they are those of
the train rows, in the order of their numbers if all are numbers, else of their letters. Left out: several
labels a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from sqat.data.dataset import Batch, Rows, column
from sqat.data.text_files import listed
from sqat.distillation.outputs import logit_loss
from sqat.errors import SqatError
from sqat.recipe.tasks import ClassificationTask
from sqat.tasks import metrics
from sqat.tasks.slack import slack


@dataclass(frozen=True)
class Classification:
    """Choose one of ``labels``."""

    labels: tuple[str, ...]
    metric: Literal["accuracy", "f1"] = "accuracy"
    architecture: str = "texts"

    @classmethod
    def of(cls, config: ClassificationTask, train_rows: Rows) -> Classification:
        """Take the classes of the recipe, or of the train rows.

        Raises:
            SqatError: the recipe has fewer than two classes, or one of them twice.
        """
        labels = config.labels or _in_order(set(train_rows["label"]))
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise SqatError(f"task.labels is {listed(list(labels))}", "give at least two, each once")
        return cls(labels, config.metric, "images" if config.name == "image-classification" else "texts")

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
            near = get_close_matches(names[unknown], self.labels, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"train has {listed(list(self.labels)[:20])}"
            raise SqatError(f'unknown class "{names[unknown]}"', hint, rows[unknown]["place"])
        return rows.remove_columns("label").add_column("label", [numbers[name] for name in names])

    def training_groups(self, rows: Rows, seed: int, epoch: int) -> list[list[int]]:
        return [[row] for row in range(len(rows))]

    def evaluation_rows(self, rows: Rows) -> Rows:
        return rows

    def data_warnings(self, rows: Rows) -> list[str]:
        return []

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), batch.labels)

    def output_loss(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return logit_loss(student, teacher, temperature)

    def metrics(self, logits: Tensor, rows: Rows) -> dict[str, float]:
        metrics.finite(logits)
        return metrics.classification(column(rows, "label"), self.decisions(logits, rows))

    def decisions(self, logits: Tensor, rows: Rows) -> Tensor:
        """Number of the chosen class, int64 [N]."""
        return logits.argmax(dim=1)

    def same_decision(self, wanted: Tensor, got: Tensor, rows: Rows) -> Tensor:
        """Bool [N]: the same class, or one that the reference scores as high but for its `slack`."""
        chosen = wanted.gather(1, self.decisions(got, rows)[:, None]).squeeze(1)
        return wanted.amax(dim=1) - chosen <= slack(wanted)


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted by number where every label is one ("10" after "9"), by text otherwise."""
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))
