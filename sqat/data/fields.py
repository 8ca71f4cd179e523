"""Checked values out of rows: texts, numbers, classes, grades, pixels, and the passages of a query.

A row is a dict as the file has it. An error names the row's place, what the row holds, and the recipe key of the
column. A missing value is an error; there are no defaults.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sqat.data.image_files import check_same_size, picture_of
from sqat.data.rows import Record, Rows
from sqat.data.text_files import Placed, Row
from sqat.data.wording import GRADES_OF_TRUTH, did_you_mean, kind, shorten
from sqat.errors import SqatError
from sqat.recipe.inputs import Columns

HIGHEST_GRADE = 100
WHOLE = re.compile(r"([+-]?[0-9]+)\.0*")


def read_texts(source: Iterator[Placed], columns: Columns, label_of: Callable[..., Any]) -> Iterator[Record]:
    """Yield a record of one or two texts and a label a row."""
    for place, row in source:
        record: Record = {"text": text_of(row, columns.text, "text", place)}
        if columns.text_pair is not None:
            record["text_pair"] = text_of(row, columns.text_pair, "text_pair", place)
        yield record | {"label": label_of(row, columns.label, "label", place), "place": place}


def read_pixels(source: Iterator[Placed], columns: Columns, folder: Path | None) -> Iterator[tuple[str, Row, Record]]:
    """Yield place, row and record of each image: its pixels as bytes, and the size that all rows share."""
    first = None
    for place, row in source:
        picture = picture_of(column_value(row, columns.image, "image", place), columns.image, folder, place)
        first = picture if first is None else first
        check_same_size(picture, first, columns.image, place)
        height, width, channels = picture.shape
        yield place, row, {"pixels": picture.tobytes(), "height": height, "width": width, "channels": channels}


def query_of(row: Row, columns: Columns, place: str) -> tuple[str, str]:
    """Return a row's query, and the key by which the rows of a query are found."""
    query = text_of(row, columns.query, "query", place)
    return query, query if columns.group is None else class_of(row, columns.group, "group", place)


def passages_of(row: Record, columns: Columns, place: str) -> Iterator[tuple[Record, str]]:
    """Yield the row itself, or each of its candidates, with its prefix in errors."""
    if columns.candidates is None:
        yield row, ""
        return
    candidates = column_value(row, columns.candidates, "candidates", place)
    if not isinstance(candidates, list):
        problem = f'"{columns.candidates}" must be a list of objects, got {kind(candidates)}'
        raise SqatError(problem, "for one passage a row leave data.columns.candidates out", place, code="invalid-data")
    if not candidates:
        raise SqatError(f'"{columns.candidates}" is empty', "give the query a passage or leave the row out", place,
                        code="invalid-data")  # fmt: skip
    for number, candidate in enumerate(candidates):
        within = f"{columns.candidates}[{number}]"
        if not isinstance(candidate, dict):
            hint = f'with "{columns.passage}" and "{columns.label}" in it'
            raise SqatError(f'"{within}" must be an object, got {kind(candidate)}', hint, place, code="invalid-data")
        yield candidate, f"{within}."


def column_value(row: Row, column: str, key: str, place: str, within: str = "") -> Any:
    """Return the value of a column that must exist.

    Args:
        column: the column's name in the file.
        key: the recipe key that names it, for the hint.
        within: prefix of the column in errors, e.g. ``candidates[2].``.

    Raises:
        SqatError: no such column; the hint has the nearest one.
    """
    if column in row:
        return row[column]
    hint = f"{did_you_mean(column, row)} (data.columns.{key})"
    raise SqatError(f'no column "{within}{column}"', hint, place, code="invalid-data")


def text_of(row: Row, column: str, key: str, place: str, within: str = "") -> str:
    """Return the text of a column.

    Raises:
        SqatError: missing, not a text, empty or only spaces.
    """
    value = column_value(row, column, key, place, within)
    name = f'"{within}{column}"'
    if not isinstance(value, str):
        problem, hint = f"{name} must be a text, got {kind(value)}", f"set data.columns.{key}"
    elif not value.strip():
        problem, hint = f"{name} is empty", "give it a text or leave the row out"
    else:
        return value
    raise SqatError(problem, hint, place, code="invalid-data")


def number_of(row: Row, column: str, key: str, place: str, within: str = "") -> float:
    """Return the number of a column; a text of a number counts as one, since CSV knows only texts.

    Raises:
        SqatError: missing, null, a boolean, not a number, or not finite.
    """
    value = column_value(row, column, key, place, within)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SqatError(f'"{within}{column}" must be a finite number, got {kind(value)}',
                        f"mend the row or set data.columns.{key}", place, code="invalid-data")  # fmt: skip
    return number


def grade_of(row: Row, column: str, key: str, place: str, within: str = "", highest: float | None = None) -> float:
    """Return the relevance grade of a column: a number, 0 for not relevant; true is 1 and false is 0.

    Raises:
        SqatError: not a number, below 0, or above ``highest`` (of the recipe) or `HIGHEST_GRADE`.
    """
    value = column_value(row, column, key, place, within)
    truth = GRADES_OF_TRUTH.get(str(value).lower()) if isinstance(value, bool | str) else None
    grade = number_of(row, column, key, place, within) if truth is None else truth
    name = f'"{within}{column}"'
    if grade < 0:
        problem, hint = f"{name} is {grade:g}, a grade must be 0 or more", "0 is not relevant"
    elif highest is not None and grade > highest:
        problem, hint = f"{name} is {grade:g}, above task.highest, {highest:g}", "mend the row or raise task.highest"
    elif grade > HIGHEST_GRADE:
        problem = f"{name} is {grade:g}, a grade must be {HIGHEST_GRADE} or less"
        hint = "its gain in NDCG is 2^grade: number the grades 0, 1, 2, ..."
    else:
        return grade
    raise SqatError(problem, hint, place, code="invalid-data")


def share_of(row: Row, column: str, key: str, place: str, within: str = "") -> float:
    """Return the number of a column that must be from 0 to 1.

    Raises:
        SqatError: not a number, or outside.
    """
    share = number_of(row, column, key, place, within)
    if not 0 <= share <= 1:
        problem = f'"{within}{column}" is {share:g}, but how well a query does is a number from 0 to 1'
        hint = f"divide it by its highest value, or set data.columns.{key}"
        raise SqatError(problem, hint, place, code="invalid-data")
    return share


def class_of(row: Row, column: str, key: str, place: str, within: str = "") -> str:
    """Return the class of a column as text, the same one whatever the format of the file (`class_name`).

    Raises:
        SqatError: missing, null, empty, NaN, or not a single value.
    """
    value = column_value(row, column, key, place, within)
    if (name := class_name(value)) is not None:
        return name
    description = "an empty text" if isinstance(value, str) else kind(value)
    raise SqatError(f'"{within}{column}" must be a class (a text or a number), got {description}',
                    f"mend the row or set data.columns.{key}", place, code="invalid-data")  # fmt: skip


def class_name(value: Any) -> str | None:
    """Return the name of a class; None for what names none.

    CSV knows only texts, so ``1``, ``1.0`` and ``"1.0"`` are the class ``1``, and true is the class ``true``.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    if isinstance(value, int | float | Decimal):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    whole = WHOLE.fullmatch(value)
    return whole[1] if whole else value


def similar_labels(labels: Iterable[str]) -> list[str]:
    """Return a remark for each label that differs from another only by white space, case or Unicode form."""
    first: dict[str, str] = {}
    remarks = []
    for label in labels:
        like = first.setdefault(unicodedata.normalize("NFKC", " ".join(label.split())).casefold(), label)
        if like != label:
            pair = f"{shorten(like)!a} and {shorten(label)!a}"
            remarks.append(f"the labels {pair} differ only by white space, case or Unicode form: two classes")
    return remarks


def check_two_labels(rows: Rows, split: str, place: str, word: str) -> None:
    """Refuse a split whose rows all have one label.

    Args:
        word: what a label is called, ``class`` or ``score``.
    """
    if len(set(rows["label"])) == 1:
        problem = f'all {len(rows)} rows have the same {word} "{rows[0]["label"]}"'
        hint = f"{split} needs at least two; is data.columns.label right, is limit too low?"
        raise SqatError(problem, hint, place, code="invalid-data")


def check_repeated_passages(rows: Rows, passage: str) -> None:
    """Refuse a passage that a query has twice with different grades.

    Args:
        passage: the column that holds the passage.
    """
    keys = ["group", passage]
    table = rows.data.table.filter(pc.greater_equal(rows.data.table["label"], 0))
    found = table.group_by(keys).aggregate([("label", "min"), ("label", "max"), ("place", "list")])
    clashes = found.filter(pc.less(found["label_min"], found["label_max"]))
    if clashes.num_rows:
        clash = clashes.slice(0, 1).to_pylist()[0]
        first, *_, last = clash["place_list"]
        grades = f"the grades {clash['label_min']:g} and {clash['label_max']:g}"
        problem = f'a query has the passage "{clash[passage][:40]}" with {grades} (first at {first})'
        raise SqatError(problem, "keep the row that is right", last, code="invalid-data")


def grade_range(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest label [Q] of each query; the rows [N] of a query must be neighbours."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    return np.minimum.reduceat(labels, starts), np.maximum.reduceat(labels, starts)
