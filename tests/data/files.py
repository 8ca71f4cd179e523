"""Files of rows that several tests read."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sqat.data.rows import Rows, SplitName
from sqat.recipe.inputs import Columns, SplitConfig
from sqat.recipe.tasks import ClassificationTask, RegressionTask, RelevanceTask, TaskSettings
from sqat.tasks.splits import load_rows

NESTED = Columns(candidates="candidates", group="qid")


CLASSES, SCORES, GRADES = ClassificationTask(), RegressionTask(), RelevanceTask()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path: Path, columns: Columns, task: TaskSettings, name: SplitName = "train", **more: Any) -> Rows:
    return load_rows(SplitConfig(path=path.name, **more), name, columns, task, path.parent)


def query(qid: str, *labels: float) -> dict[str, Any]:
    candidates = [{"text": f"passage {i} of {qid}", "label": label} for i, label in enumerate(labels)]
    return {"qid": qid, "query": f"about {qid}", "candidates": candidates}


TEXTS = [
    {"text": "good, really", "label": "yes"},
    {"text": 'two\nlines "quoted"', "label": "no"},
    {"text": "ö", "label": "yes"},
]


def write_any(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same flat rows in the format of the path's ending."""
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if plain.endswith(".csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


# One mistake each: file name, content, columns, task, and the line the user sees (its beginning, where it ends
# in "..." because the rest is a library's).
GOOD = {"text": "fine", "label": "x"}
