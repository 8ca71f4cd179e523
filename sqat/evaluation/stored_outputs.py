"""Write a model's outputs beside the texts they are of: what `sqat.data.stored_outputs` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sqat.data.rows import Record, Rows
from sqat.data.stored_outputs import OUTPUT
from sqat.errors import SqatError
from sqat.recipe.schema import Recipe
from sqat.recipe.tasks import TASKS
from sqat.tasks import Task


def check_storable(recipe: Recipe, split: str) -> None:
    """Refuse a split whose outputs cannot be stored beside texts.

    Raises:
        SqatError: the task reads images, or the split is streamed.
    """
    if "image" in TASKS[recipe.task.name].columns:
        raise SqatError(f"the task {recipe.task.name} reads images, and outputs are stored beside texts",
                        "distil from a stage or a source", "--write-outputs", code="usage")  # fmt: skip
    if split == "train" and recipe.data.train.streaming:
        raise SqatError("train is streamed, and only its first rows are at hand", "set data.train.streaming=false",
                        "--write-outputs", code="usage")  # fmt: skip


def format_outputs(recipe: Recipe, task: Task, outputs: Tensor, rows: Rows) -> bytes:
    """Return JSONL: a line for each row with its texts, its label and its output; each text of retrieval once.

    Args:
        outputs: [N, C], of the rows.
    """
    lines = {json.dumps(record, ensure_ascii=False): None for record in records_of(recipe, task, outputs, rows)}
    return "".join(f"{line}\n" for line in lines).encode()


def records_of(recipe: Recipe, task: Task, outputs: Tensor, rows: Rows) -> Iterator[Record]:
    """Yield the columns of each row as the recipe names them, and its output."""
    columns, passages = recipe.data.columns, "passage" in TASKS[recipe.task.name].columns
    labels = [*task.config_fields["id2label"].values()] if task.outputs > 1 else []
    names = ["text", "text_pair", "label"] if "text_pair" in rows.column_names else ["text", "label"]
    first: dict[tuple[str, ...], Tensor] = {}  # rounding may differ between batches: one text has one output
    for output, row in zip(outputs, rows.select_columns(names), strict=True):
        output = first.setdefault((row["text"], row.get("text_pair", "")), output)
        values = [float(f"{value:.9g}") for value in output.tolist()]  # as exact as float32
        stored: Any = dict(zip(labels, values, strict=True)) if labels else values[0] if task.outputs else values
        if not task.outputs:  # a vector is of one text, whatever query it answers
            yield {columns.passage: row["text"], OUTPUT: stored}
        elif passages:
            yield {columns.query: row["text"], columns.passage: row["text_pair"], columns.label: row["label"],
                   OUTPUT: stored}  # fmt: skip
        else:
            pair = {} if columns.text_pair is None else {columns.text_pair: row["text_pair"]}
            label = labels[row["label"]] if labels else row["label"]
            yield {columns.text: row["text"], **pair, columns.label: label, OUTPUT: stored}
