"""A teacher that is no stage: another model, which reads the texts its own way, or outputs that are stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import nn

from sqat.data.batch import Batch, Processor
from sqat.data.pixels import ImageProcessor
from sqat.data.rows import Rows
from sqat.data.stored_outputs import StoredOutputs, read_stored_outputs
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.evaluation.inference import move_to_device
from sqat.models.loading import load_pretrained
from sqat.recipe.inputs import ModelConfig
from sqat.recipe.stages import DistillConfig
from sqat.recipe.tasks import TASKS
from sqat.recipe.teacher import TeacherConfig
from sqat.tasks.splits import Splits

PLACE = "distill.teacher"


class OutsideTeacher(Protocol):
    """What a batch needs of a teacher that is no stage.

    Attributes:
        model: None where its outputs are in the batch.
    """

    @property
    def model(self) -> nn.Module | None: ...

    def add_to(self, batch: Batch, rows: Rows, indices: list[int]) -> Batch:
        """Add the teacher's inputs or outputs to a batch of prepared rows."""


@dataclass(frozen=True)
class StoredTeacher:
    """Outputs that are stored."""

    stored: StoredOutputs
    model: None = None

    def add_to(self, batch: Batch, rows: Rows, indices: list[int]) -> Batch:
        return self.stored.add_to(batch, rows, indices)


@dataclass
class ModelTeacher:
    """A model with its own tokenizer.

    Attributes:
        same_tokens: the loss compares tokens, so that both models must read the same ones.
        prepared: the last rows, and the same as the teacher reads them.
    """

    model: nn.Module
    processor: Processor
    max_length: int
    same_tokens: bool
    prepared: tuple[Rows, Rows] | None = field(default=None, repr=False)

    def add_to(self, batch: Batch, rows: Rows, indices: list[int]) -> Batch:
        if not isinstance(self.processor, TextProcessor):
            return batch  # of images, which both scale alike
        if self.prepared is None or self.prepared[0] is not rows:
            texts = [name for name in ("text", "text_pair", "label") if name in rows.column_names]
            self.prepared = rows, self.processor.prepare(rows.select_columns(texts), self.max_length)
        inputs = self.processor.collate(self.prepared[1], indices).inputs
        if self.same_tokens:
            check_same_tokens(batch, inputs)
        return replace(batch, teacher_inputs=inputs)


def load_outside_teacher(
    config: TeacherConfig, distill: DistillConfig, splits: Splits, processor: Processor
) -> OutsideTeacher:
    """Load the model or the stored outputs that teach a stage.

    Args:
        processor: the student's.

    Raises:
        SqatError: no such model or file, another head than the task's, or train rows without an output.
    """
    if config.column is not None:
        return StoredTeacher(read_outputs(config, splits))
    recipe, task = splits.recipe, splits.task
    max_length = config.max_length or recipe.model.max_length
    needs_head = bool(task.outputs and distill.output_weight)
    head: Literal["by-name", "new"] = "by-name" if needs_head or not task.outputs else "new"
    settings = ModelConfig(source=config.source, revision=config.revision, max_length=max_length, head=head)
    fields = {"num_labels": task.outputs, **task.config_fields} if task.outputs else {}
    try:
        model, own = load_pretrained(task.architecture, settings, splits.folder, fields, recipe.seed,
                                     is_trained=False, needs_head=needs_head, key=f"{PLACE}.source")  # fmt: skip
    except SqatError as error:
        place = f"{PLACE}: {error.place}" if error.place else PLACE
        raise SqatError(error.problem, error.hint, place, code=error.code) from error
    if isinstance(own, ImageProcessor) and own != processor:
        raise SqatError("the teacher scales images in another way than the student",
                        "give both one preprocessor_config.json", PLACE, code="model-mismatch")  # fmt: skip
    move_to_device(model.eval().requires_grad_(False), own)
    return ModelTeacher(model, own, max_length, bool(distill.minilm_weight or distill.hidden_weight))


def read_outputs(config: TeacherConfig, splits: Splits) -> StoredOutputs:
    """Read the stored outputs of the train rows."""
    recipe, task = splits.recipe, splits.task
    name = config.file or recipe.data.train.path
    assert name is not None  # a recipe is checked
    assert config.column is not None
    passages = "passage" in TASKS[recipe.task.name].columns
    labels = tuple(task.config_fields["id2label"].values()) if task.outputs > 1 else ()
    return read_stored_outputs(splits.folder / name, name, config.column, recipe.data.columns, splits.rows("train"),
                               passages=passages, labels=labels, width=task.outputs)  # fmt: skip


def check_same_tokens(batch: Batch, inputs: dict[str, torch.Tensor]) -> None:
    """Refuse a teacher that reads other tokens than the student, whose relations or hidden states it teaches."""
    own, other = batch.inputs, inputs
    real = own["attention_mask"].bool()
    if not (
        torch.equal(own["attention_mask"], other["attention_mask"])
        and torch.equal(own["input_ids"][real], other["input_ids"][real])
    ):
        raise SqatError("the teacher's tokenizer reads other tokens than the student's",
                        "distil outputs only: minilm_weight: 0, hidden_weight: 0", PLACE,
                        code="model-mismatch")  # fmt: skip
