"""Outputs of a teacher that stand in a file beside the texts they are of, found again by these texts.

`sqat evaluate --write-outputs` writes such a file: JSONL with the texts in the columns of the recipe, and ``output``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqat.data.batch import Batch
from sqat.data.fields import class_name, column_value, passages_of, text_of
from sqat.data.rows import CHUNK, Record, Rows
from sqat.data.text_files import Row, read_rows
from sqat.data.wording import kind, listed, shorten
from sqat.errors import SqatError
from sqat.files.read import parse_json
from sqat.recipe.inputs import Columns

OUTPUT = "output"  # the column that `sqat evaluate --write-outputs` writes
Key = tuple[str, ...]


@dataclass(frozen=True)
class StoredOutputs:
    """Outputs [N, C], and the number of each by the texts of its row."""

    outputs: Tensor
    numbers: Mapping[Key, int]
    place: str

    def add_to(self, batch: Batch, rows: Rows, indices: list[int]) -> Batch:
        """Add the outputs of a batch's rows.

        Raises:
            SqatError: a row has none.
        """
        picked = rows[indices]
        texts = zip(*(picked[name] for name in text_columns(rows)), strict=True)
        numbers = [self.numbers.get(key, -1) for key in texts]
        if -1 in numbers:
            row = numbers.index(-1)
            raise SqatError(f"the text {shorten(picked['text'][row])!a} has no stored output in {self.place}",
                            "add it, or leave the row out", picked["place"][row], code="invalid-data")  # fmt: skip
        return replace(batch, teacher_outputs=self.outputs[numbers])


def read_stored_outputs(
    path: Path,
    source_name: str,
    column: str,
    columns: Columns,
    rows: Rows,
    *,
    passages: bool,
    labels: Sequence[str],
    width: int,
) -> StoredOutputs:
    """Read the outputs of rows from a file.

    Args:
        column: that holds them.
        rows: of train, each of which must have one; of a streamed split, the first.
        passages: whether the task reads passages, of a query where rows have two texts.
        labels: of a classification, in order; an output may name them.
        width: numbers of an output; 0 for vectors of any one width.

    Raises:
        SqatError: a row without texts or output, an output of another form, or two for the same texts.
    """
    outputs: list[list[float]] = []
    numbers: dict[Key, int] = {}
    paired = "text_pair" in rows.column_names
    for place, row in read_rows(path, source_name):
        alone = [] if passages else [(texts_of(row, columns, place), row, "")]
        for key, holder, within in passages_with_key(row, columns, place, paired) if passages else alone:
            given = column_value(holder, column, "distill.teacher.column", place, within)
            value = parse_output(given, labels)
            width = width or len(value)
            if not value or len(value) != width or not all(map(math.isfinite, value)):
                raise wrong_output(f"{within}{column}", given, width, labels, place)
            number = numbers.setdefault(key, len(outputs))
            if number == len(outputs):
                outputs.append(value)
            elif outputs[number] != value:
                raise SqatError(f"the text {shorten(key[-1])!a} has two outputs", "keep one of them", place,
                                code="invalid-data")  # fmt: skip
    stored = StoredOutputs(torch.tensor(outputs), numbers, source_name)
    for start in range(0, len(rows), CHUNK):
        numbers_of_chunk = [*range(start, min(start + CHUNK, len(rows)))]
        stored.add_to(Batch({}, torch.empty(0), torch.empty(0)), rows, numbers_of_chunk)
    return stored


def wrong_output(name: str, given: Any, width: int, labels: Sequence[str], place: str) -> SqatError:
    """Make the error for an output of another form."""
    allowed = f"a list of {width} finite numbers" if width > 1 else "a finite number"
    named = f", or a number for each of {listed(labels)}" if labels else ""
    got = f"a list of {len(given)}" if isinstance(given, list) else kind(given)
    return SqatError(f'"{name}" must be {allowed}{named}, got {got}', "mend the row or set distill.teacher.column",
                     place, code="invalid-data")  # fmt: skip


def texts_of(row: Row, columns: Columns, place: str) -> Key:
    """Return the one or two texts of a row."""
    first = text_of(row, columns.text, "text", place)
    return (first,) if columns.text_pair is None else (first, text_of(row, columns.text_pair, "text_pair", place))


def passages_with_key(row: Row, columns: Columns, place: str, paired: bool) -> Iterator[tuple[Key, Record, str]]:
    """Yield for each passage of a row its text, after its query's where they are a pair; its row; its prefix."""
    nested = columns if columns.candidates in row else columns.model_copy(update={"candidates": None})
    for passage, within in passages_of(row, nested, place):
        text = text_of(passage, columns.passage, "passage", place, within)
        yield (text_of(row, columns.query, "query", place), text) if paired else (text,), passage, within


def parse_output(value: Any, labels: Sequence[str]) -> list[float]:
    """Return an output as numbers in the order of the labels; empty where it has another form."""
    if isinstance(value, str) and value[:1] in ("[", "{"):  # CSV knows only texts
        try:
            value = parse_json(value, "")
        except SqatError:
            return []
    if isinstance(value, dict):
        named = {class_name(name): number for name, number in value.items()}
        value = [named[label] for label in labels] if named.keys() == set(labels) else []
    numbers = value if isinstance(value, list) else [value]
    try:
        return [math.nan if isinstance(number, bool) else float(number) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        return []


def text_columns(rows: Rows) -> list[str]:
    """Return the names of the columns that hold a row's texts."""
    return [name for name in ("text", "text_pair") if name in rows.column_names]
