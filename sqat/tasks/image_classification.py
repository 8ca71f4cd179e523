"""Classification of images: other rows and models than `sqat.tasks.classification`, the same loss and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sqat.data.fields import class_of, read_pixels
from sqat.data.rows import Record, Rows
from sqat.data.text_files import Placed
from sqat.recipe.inputs import Columns
from sqat.recipe.tasks import ClassificationTask
from sqat.tasks import classification
from sqat.tasks.classification import check_rows as check_rows


def read_records(
    source: Iterator[Placed], columns: Columns, settings: ClassificationTask, limit: int | None, folder: Path | None
) -> Iterator[Record]:
    """Yield images with a class."""
    pixels = read_pixels(source, columns, folder)
    return islice(({**record, "label": class_of(row, columns.label, "label", place), "place": place}
                   for place, row, record in pixels), limit)  # fmt: skip


def build(settings: ClassificationTask, train_rows: Rows) -> classification.Classification:
    """Make the task."""
    return classification.build(settings, train_rows, "images")
